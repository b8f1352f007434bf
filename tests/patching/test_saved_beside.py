"""`model.save_pretrained` of a patched model: the model as it is without edits, which loads everywhere; the edit beside it."""

import copy
import io
import os

import pytest
import tiny_models as tiny
import torch
from patch_cases import scrambled

import fastedit as fe


def patched(family, **options):
    model = tiny.build(family)
    return model, scrambled(fe.patch(model, fe.ScaleBias(site="mlp"), **options))


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "t5"])
def test_the_model_loads_without_a_word_and_the_edit_by_load(family, tmp_path):
    model, handle = patched(family)
    handle.strength = 0.5
    edited, bare = tiny.output(model, family), tiny.output(tiny.build(family), family)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(tiny.output(again.eval(), family), bare)
    fe.load(again, tmp_path)
    assert torch.equal(tiny.output(again, family), edited) and not torch.allclose(edited, bare, atol=1e-3)
    handle.remove()
    assert "save_pretrained" not in model.__dict__


def test_what_is_no_one_edit_is_refused_before_anything_is_written(tmp_path):
    model, first = patched("llama")
    second = fe.patch(model, fe.Steer(torch.ones(tiny.WIDTH)))
    with pytest.raises(ValueError, match="holds 2 handles: save each with"):
        model.save_pretrained(tmp_path / "a")
    second.remove()
    model.save_pretrained(tmp_path / "b")
    first.remove()
    fe.patch(model, fe.ScaleBias(), tenants=2)
    with pytest.raises(ValueError, match="several tenants"):
        model.save_pretrained(tmp_path / "c")
    assert os.listdir(tmp_path) == ["b"]


def test_merged_weights_are_saved_alone_and_not_beside_an_edit(tmp_path):
    model, handle = patched("gpt2")
    model.save_pretrained(tmp_path / "edit")
    handle.merge()
    with pytest.raises(ValueError, match="would put that edit on top"):
        model.save_pretrained(tmp_path / "edit")
    model.save_pretrained(tmp_path / "merged")
    assert "edit.json" not in os.listdir(tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(tiny.output(again, "gpt2"), tiny.output(model, "gpt2"))


def test_a_bank_is_not_saved_with_the_model(tmp_path):
    model = tiny.build("llama")
    bank = fe.Bank(model, 2)
    model.save_pretrained(tmp_path)
    _, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"] and "edit.json" not in os.listdir(tmp_path)
    bank.close()
    assert "save_pretrained" not in model.__dict__


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_saves_itself(how, tmp_path):
    model, handle = patched("llama")
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    handle.remove()
    twin.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    fe.load(again, tmp_path)
    assert torch.equal(tiny.output(again, "llama"), tiny.output(twin, "llama"))


def test_a_state_that_is_given_is_saved_as_it_is(tmp_path):
    """As a Trainer's checkpoints are, which are loaded into the patched model again."""
    model, _ = patched("llama")
    model.save_pretrained(tmp_path, state_dict=None)
    assert "edit.json" not in os.listdir(tmp_path)
    again = tiny.build("llama")
    fe.load(again, tmp_path)
    assert torch.equal(tiny.output(again, "llama"), tiny.output(model, "llama"))
