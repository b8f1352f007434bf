"""The example of docs/adopt.md, as it stands on the page."""

import re
from pathlib import Path

import pytest
import torch

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "adopt.md").read_text()


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft", reason="needs PEFT")
    (example,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.S | re.M)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    exec(compile(example, "docs/adopt.md", "exec"), names)
    torch.testing.assert_close(names["fast"], names["slow"], rtol=1e-4, atol=1e-5)
    assert torch.equal(names["again"], names["slow"]) and names["handle"].removed
    assert (tmp_path / "my-ia3" / "edit.json").exists()
    assert "ffn_in" in capsys.readouterr().out
