"""The examples of docs/recontrol.md and docs/rahf.md that need no large model, as they stand on the pages."""

import re
from pathlib import Path

import pytest
import torch

SAYS = r"earns ([\d.]+) in the mean, ([\d.]+) with control and ([\d.]+) with its sign turned"
DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture
def run(shared, tmp_path, monkeypatch):
    """Run a page's first example that reads ../shared, in an empty folder beside it; its names."""

    def run(page):
        (tmp_path / "shared").symlink_to(shared)
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
        names = {}
        exec(compile(next(block for block in blocks if "../shared" in block), page, "exec"), names)
        return names

    return run


def test_recontrol(run):
    names = run("recontrol.md")
    earned = names["earned"]
    assert earned[-1.0] + 1 < earned[0.0] < earned[1.0] - 2
    assert Path("my-control/edit.json").exists()
    figures = re.search(SAYS, " ".join((DOCS / "recontrol.md").read_text().split()))
    for found, strength in zip(figures.groups(), (0.0, 1.0, -1.0), strict=True):
        assert abs(float(found) - earned[strength]) < 1.5


def test_rahf(run):
    torch.manual_seed(0)
    names = run("rahf.md")
    assert names["after"] < 0.96 * names["before"]
    assert Path("aligned/edit.json").exists()

