"""The examples of docs/recontrol.md and docs/rahf.md as they stand on the pages: which way what they measure goes, by intervals
over what was held out. Figures depend on the machine, since sampled responses do.
"""

import re
from pathlib import Path

import pytest
import tiny_chat
import torch

import fastedit as fe

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a page's first example in an empty folder, with a chat model of one's own; its names."""

    def run(page, chat=None):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(fe, "chat_model", lambda: chat)
        block = re.search(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
        names = {}
        exec(compile(block[1], page, "exec"), names)
        return names

    return run


def apart(more, less):
    """Whether Student's 95 % interval of the mean of eight paired differences lies above 0."""
    difference = torch.as_tensor(more, dtype=torch.float64) - torch.as_tensor(less, dtype=torch.float64)
    assert len(difference) == 8
    return bool(difference.mean() > 2.365 * difference.std() / 8**0.5)


def test_recontrol(run):
    earned = run("recontrol.md")["earned"]
    assert apart(earned[1.0], earned[0.0]) and apart(earned[0.0], earned[-1.0])
    assert Path("my-control/edit.json").exists()


def test_rahf_on_a_tiny_model(run):
    names = run("rahf.md", tiny_chat.build(12))
    assert apart(names["before"], names["after"])
    assert Path("aligned/edit.json").exists()


@pytest.mark.slow
def test_rahf_on_the_chat_model(run, chat_model):
    names = run("rahf.md", chat_model)
    names["handle"].remove()
    chat_model[0].requires_grad_(True)
    assert apart(names["before"], names["after"])
