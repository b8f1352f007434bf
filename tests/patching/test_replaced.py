"""Modules that are replaced after patching: the edits follow to the same place, or the forward is refused."""

import copy

import pytest
import tiny_models as tiny
import torch
from bank_cases import bank_of, ids, logits, red
from patch_cases import paths, scrambled

import fastedit as fe
from fastedit.families.own_class import base_of
from fastedit.patching.merge import MergeError

FAMILIES = ("llama", "gpt2", "t5")
V = torch.randn(tiny.WIDTH, generator=torch.Generator().manual_seed(4))


def bare(module):
    """A module of the class that a patched one had, with its weights: what another library would put in its place."""
    twin = copy.deepcopy(module)
    for part in twin.modules():
        part.__class__ = base_of(part)
        for name in [name for name in part.__dict__ if name.startswith("_fastedit")]:
            del part.__dict__[name]
    return twin


def place_of(model, module):
    """(holder, name) of a module."""
    return next((h, name) for h in model.modules() for name, m in h._modules.items() if m is module)


def replace(model, module, new=None):
    holder, name = place_of(model, module)
    setattr(holder, name, bare(module) if new is None else new)


def edits():
    return [fe.RED(), fe.Steer(V, site="attn"), fe.Ablate(V, site="block", positions="last 3")]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_edits_follow_to_the_module_that_took_the_place(family, fused):
    model = tiny.build(family)
    before = tiny.output(model, family)
    handle = scrambled(fe.patch(model, edits(), fused=fused))
    said, on = tiny.output(model, family), paths(handle)
    for site, layer in (("mlp", 1), ("attn", 0), ("block", 1)):
        replace(model, tiny.site_module(model, family, site, layer))
        assert torch.equal(tiny.output(model, family), said), site
    assert paths(handle) == on
    replace(model, tiny.site_module(model, family, "mlp", 0))
    assert paths(handle) == on, "the report looks, too"
    assert torch.equal(tiny.output(model, family), said)
    handle.strength = 0.5
    assert not torch.equal(tiny.output(model, family), said)
    handle.remove()
    assert torch.equal(tiny.output(model, family), before)
    assert not any(name.startswith("_fastedit") for m in model.modules() for name in m.__dict__)


@pytest.mark.parametrize("family", FAMILIES)
def test_banks_and_tenants_follow_too(family):
    for face in ("bank", "tenants"):
        model = tiny.build(family)
        if face == "bank":
            holder, who = bank_of(model, {"anna": red(1, count=tiny.number_of_layers(family))}), ["anna"]
        else:
            holder, who = scrambled(fe.patch(model, fe.RED(), tenants=2)), [1]
        with holder.assign(who * 2):
            said = tiny.output(model, family)
        replace(model, tiny.site_module(model, family, "mlp", 1))
        with holder.assign(who * 2):
            assert torch.equal(tiny.output(model, family), said)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_merged_and_unloaded_under_an_edit(family, fused):
    peft = pytest.importorskip("peft")
    targets = {"llama": ["down_proj"], "gpt2": ["c_proj"], "t5": ["wo"]}[family]
    model = tiny.build(family)
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, fan_in_fan_out=family == "gpt2")
    adapted = peft.get_peft_model(model, config).eval()
    handle = scrambled(fe.patch(model, fe.RED(), fused=fused))
    said = tiny.output(model, family)
    assert type(tiny.site_module(model, family, "mlp", 0)).__module__.startswith("peft.")
    adapted.merge_and_unload()
    assert not type(tiny.site_module(model, family, "mlp", 0)).__module__.startswith("peft.")
    torch.testing.assert_close(tiny.output(model, family), said, rtol=1e-4, atol=1e-4)
    on = paths(handle)["mlp"]
    assert on == "fused" if fused else on.startswith("plain: fused=False")
    handle.strength = 0.0
    assert (tiny.output(model, family) - said).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_put_on_and_off_again(family):
    """The edit stays on the map that it was put on: what the adapter adds comes behind it."""
    peft = pytest.importorskip("peft")
    model = tiny.build(family)
    handle = scrambled(fe.patch(model, fe.RED()))
    said = tiny.output(model, family)
    targets = {"llama": ["down_proj"], "gpt2": ["c_proj"], "t5": ["wo"]}[family]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, fan_in_fan_out=family == "gpt2")).eval()
    torch.testing.assert_close(tiny.output(model, family), said, rtol=1e-4, atol=1e-4)
    assert "another library has wrapped" in paths(handle)["mlp"]
    adapted.unload()
    assert torch.equal(tiny.output(model, family), said) and paths(handle)["mlp"] == "fused"


@pytest.mark.parametrize("family", FAMILIES)
def test_another_kind_of_place_is_refused_until_the_edits_are_off(family):
    model = tiny.build(family)
    handle = fe.patch(model, fe.RED())
    module = tiny.site_module(model, family, "mlp", 1)
    holder, name = place_of(model, module)
    setattr(holder, name, torch.nn.Linear(48, 16))
    for look in (lambda: tiny.output(model, family), handle.report, handle.merge):
        with pytest.raises(RuntimeError, match="16 wide now, and its edits are 32 wide"):
            look()
    setattr(holder, name, bare(module))
    said = tiny.output(model, family)
    handle.remove()
    torch.testing.assert_close(tiny.output(model, family), said, rtol=1e-4, atol=1e-4)


def test_layers_that_are_gone_are_refused():
    model = tiny.build("llama")
    handle, bank = fe.patch(model, fe.RED(positions="last 2")), bank_of(model)
    del model.model.layers[2:]
    with pytest.raises(RuntimeError, match=r"layers\.2 has edits but is no longer in the model"):
        tiny.output(model, "llama")
    bank.close()
    with pytest.raises(RuntimeError, match=r"layers\.2 has edits"):
        tiny.output(model, "llama")
    handle.remove()
    other = tiny.build("llama")
    del other.model.layers[2:]
    assert torch.equal(tiny.output(model, "llama"), tiny.output(other, "llama"))
    fe.patch(model, fe.RED())


def test_a_compiled_model_is_refused_until_the_edits_have_followed():
    torch._dynamo.reset()
    model = tiny.build("llama", num_hidden_layers=1)
    handle = scrambled(fe.patch(model, fe.RED()))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    said = tiny.output(compiled, "llama")
    replace(model, model.model.layers[0].mlp.down_proj)
    with pytest.raises(Exception, match="were replaced since they were patched"):
        tiny.output(compiled, "llama")
    handle.report()
    torch.testing.assert_close(tiny.output(compiled, "llama"), said, rtol=1e-5, atol=1e-5)


def test_merged_weights_that_were_replaced_are_not_unmerged():
    model = tiny.build("llama")
    handle = scrambled(fe.patch(model, fe.RED()))
    handle.merge()
    said = tiny.output(model, "llama")
    replace(model, model.model.layers[0].mlp.down_proj)
    for back in (handle.unmerge, handle.remove):
        with pytest.raises(MergeError, match="was replaced since"):
            back()
    assert handle.merged and torch.equal(tiny.output(model, "llama"), said)


def test_a_copy_of_a_model_with_a_bank_is_served_by_a_bank_of_its_own():
    model = tiny.build("llama")
    bank = bank_of(model)
    with bank.assign(["anna"] * 4):
        said = logits(model, ids())
        twin = copy.deepcopy(model)
        (own,) = fe.banks.bank.banks(twin)
        assert own is not bank and own.model is twin and own.stats().in_use == 0
        unedited = logits(twin, ids())
    with own.assign(["anna"] * 4):
        assert torch.equal(logits(twin, ids()), said)
        with pytest.raises(RuntimeError, match="leave it before close"):
            own.close()
    replace(twin, twin.model.layers[1].mlp.down_proj)
    with own.assign(["anna"] * 4):
        assert torch.equal(logits(twin, ids()), said)
    own.remove("anna")
    assert "anna" in bank and torch.equal(logits(twin, ids()), unedited)


def test_looking_costs_no_call_a_layer():
    """What a forward calls in fastedit to look: two functions, however many layers there are."""
    import sys

    calls = []

    def trace(frame, event, _):
        if event == "call" and frame.f_code.co_filename.endswith(("patching/replaced_modules.py", "patching/model_edits.py")):
            calls.append(frame.f_code.co_name)

    for layers in (1, 6):
        model = tiny.build("llama", num_hidden_layers=layers)
        fe.patch(model, fe.RED())
        logits(model, ids())
        calls.clear()
        sys.setprofile(trace)
        try:
            logits(model, ids())
        finally:
            sys.setprofile(None)
        assert calls == ["look", "intact"]
