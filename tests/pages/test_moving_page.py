"""docs/moving.md, the other libraries' half too: make peers, then .venv-peers/bin/python -m pytest."""

import copy
import importlib.util

import numpy as np
import pages
import pytest
import torch
from test_pages import assumed, whole  # noqa: F401 (a fixture)

THEIRS = [block for block in pages.blocks("moving.md") if block.code.startswith("# needs ")]


@pytest.mark.parametrize("block", THEIRS, ids=lambda block: block.code.split()[2])
def test_the_other_librarys_half_runs(block, whole, tmp_path, monkeypatch):  # noqa: F811
    library = block.code.split()[2]
    if importlib.util.find_spec(library) is None:
        pytest.skip("needs the peers: make peers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(np, "float_", np.float64, raising=False)
    model, said = whole
    names = assumed(model, said)
    names["model"] = copy.deepcopy(model)
    torch.manual_seed(0)
    exec(compile(block.code, str(block), "exec"), names)
    if library == "repeng":  # "the same but for their sign"
        told = {name: names[name] for name in ("model", "tokenizer", "positive", "negative")}
        ours = names["fe"].contrast(*told.values(), method="pca", centre=True, layers=[8, 9, 10, 11])
        for layer, vector in ours.items():
            assert abs(vector @ torch.tensor(names["vector"].directions[layer])) > 0.999
    if library == "transformer_lens":
        plain = copy.deepcopy(model)
        with torch.no_grad(), names["fe"].patch(plain, names["fe"].Steer(names["directions"], strength=1.5)):
            torch.testing.assert_close(names["logits"], plain(names["inputs"]["input_ids"]).logits, rtol=1e-3, atol=1e-4)
    if library == "pyreft":
        names["handle"] = names["fe"].load_adapter(copy.deepcopy(model), "their-edit", positions="last 1")
        assert [str(edit).split("(")[0] for edit in names["handle"].edits] == ["LowRank"]  # h + (W h + c − R h) R, folded
    if library == "peft":
        names["handle"] = names["fe"].load_adapter(names["model"], "their-ia3")
        assert names["handle"].edits[0].site == "ffn_in"
