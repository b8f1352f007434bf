"""The notebooks of the documentation on a tiny model in place of the chat model; `make docs` runs them on that one."""

import copy

import pages
import pytest
import torch
from test_pages import whole  # noqa: F401 (a fixture)

import fastedit as fe

NOTEBOOKS = [page for page in pages.pages() if page.startswith("notebooks/")]


def test_there_are_five():
    assert len(NOTEBOOKS) == 5


@pytest.mark.parametrize("page", NOTEBOOKS)
def test_the_cells_of_a_notebook_run(page, whole, tmp_path, monkeypatch):  # noqa: F811
    pytest.importorskip("matplotlib", reason="needs matplotlib").use("Agg")
    for package in {"frameworks": ("jax",), "probes": ("IPython",), "red-and-lora": ("peft", "accelerate")}.get(page[10:-3], ()):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    model, said = whole
    monkeypatch.setitem(fe.__dict__, "chat_model", lambda: (copy.deepcopy(model), said))
    names = {}
    torch.manual_seed(0)
    for block in pages.blocks(page, "code-cell"):
        exec(compile(block.code, str(block), "exec"), names)
