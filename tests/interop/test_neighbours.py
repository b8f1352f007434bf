"""What users of such libraries complain of, where it concerns fastedit: hooks that vanish or see the wrong output,
adapters and edits in each other's way, biases that a merge loses. Adoption has its own tests."""

import copy

import pytest
import tiny_models as tiny
import torch
from patch_cases import scrambled

import fastedit as fe

PATHS = (True, False)
LORA = {"r": 2, "init_lora_weights": False}


@pytest.mark.parametrize("fused", PATHS)
def test_hooks_of_others_survive_a_removal_and_see_the_edited_output_whenever_they_came(fused):
    model, seen = tiny.build("llama"), {}

    def watch(site, when):
        module = tiny.site_module(model, "llama", site, 1)
        return module.register_forward_hook(lambda m, a, o: seen.__setitem__((site, when), o))

    sites = ("mlp", "attn", "block")
    hooks = [watch(site, "before") for site in sites]
    tiny.output(model, "llama")
    unedited = dict(seen)
    handle = fe.patch(model, [fe.Steer(torch.ones(tiny.WIDTH), site=site, layers=1) for site in sites], fused=fused)
    hooks += [watch(site, "after") for site in sites]
    tiny.output(model, "llama")
    for site in sites:
        assert torch.equal(seen[site, "before"], seen[site, "after"])
    torch.testing.assert_close(seen["attn", "after"], unedited["attn", "before"] + 1)
    handle.remove()
    seen.clear()
    tiny.output(model, "llama")
    assert all(torch.equal(seen[site, when], unedited[site, "before"]) for site in sites for when in ("before", "after"))
    for hook in hooks:
        hook.remove()
    assert not any(m._forward_hooks for m in model.modules())


def test_a_merge_keeps_the_bias_that_the_linear_map_has():
    model = tiny.build("llama", attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.bias"):
                parameter.normal_()
    linear = model.model.layers[1].mlp.down_proj
    weight, bias = linear.weight.clone(), linear.bias.clone()
    handle = scrambled(fe.patch(model, fe.RED(layers=1)))
    edited, exact = tiny.output(model, "llama"), tiny.output(tiny.exact(model), "llama")
    scale, added = handle.named_tensors().values()
    tiny.quiet(handle.merge)
    torch.testing.assert_close(linear.bias, scale * bias + added)
    torch.testing.assert_close(linear.weight, scale[:, None] * weight)
    tiny.assert_promise(tiny.output(model, "llama"), edited, exact)
    handle.remove()
    assert torch.equal(linear.bias, bias) and torch.equal(linear.weight, weight)


def lora(model, targets):
    peft = pytest.importorskip("peft", reason="needs PEFT")
    torch.manual_seed(3)
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, **LORA))


def reference(order, edits):
    """The same, of plain hooks: on the whole linear map, or on the base inside the adapter."""
    model = lora(tiny.build("llama"), ["q_proj", "down_proj"]).double().get_base_model().eval()
    for layer, (scale, bias) in edits.items():
        module = model.model.layers[layer].mlp.down_proj
        module = module.base_layer if order == "patch, then PEFT" else module
        module.register_forward_hook(lambda m, a, o, s=scale, b=bias: s.double() * o + b.double())
    return model


ORDERS = ("PEFT, then patch", "patch, then PEFT")


def both(order, fused):
    """(the model, its handle, the PeftModel)"""
    model = tiny.build("llama")
    if order == "PEFT, then patch":
        wrapped = lora(model, ["q_proj", "down_proj"])
        handle = fe.patch(wrapped, fe.RED(), fused=fused)
    else:
        handle = fe.patch(model, fe.RED(), fused=fused)
        wrapped = lora(model, ["q_proj", "down_proj"])
        for parameter in handle.parameters():  # PEFT freezes all that is not its own
            parameter.requires_grad_(True)
    return model, scrambled(handle), wrapped.eval()


@pytest.mark.parametrize("fused", PATHS)
@pytest.mark.parametrize("order", ORDERS)
def test_an_edit_and_an_adapter_on_one_linear_map_act_in_the_order_they_came(order, fused):
    model, handle, wrapped = both(order, fused)
    tensors = list(handle.named_tensors().values())
    exact = reference(order, {n: (tensors[2 * n], tensors[2 * n + 1]) for n in range(tiny.LAYERS)})
    expected = tiny.output(exact, "llama")
    got = tiny.output(model, "llama")
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    second = fe.patch(handle.model, fe.Steer(torch.zeros(tiny.WIDTH)), fused=fused)  # puts the layers' edits on anew
    torch.testing.assert_close(tiny.output(model, "llama"), got, rtol=1e-5, atol=1e-5)
    second.remove()
    assert handle.model is (wrapped if order == "PEFT, then patch" else model)


@pytest.mark.parametrize("fused", PATHS)
@pytest.mark.parametrize("order", ORDERS)
def test_an_edit_and_an_adapter_train_together(order, fused):
    model, handle, wrapped = both(order, fused)
    given = tiny.inputs("llama")
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    assert {id(p) for p in handle.parameters()} < {id(p) for p in trained}
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    before, losses = [p.detach().clone() for p in trained], []
    for _ in range(8):
        loss = wrapped(**given, labels=given["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] and not any(torch.equal(a, b) for a, b in zip(before, trained, strict=True))
    handle.remove()
    plain = lora(tiny.build("llama"), ["q_proj", "down_proj"]).eval()
    assert [type(m) for m in wrapped.modules()] == [type(m) for m in plain.modules()]
    adapters = {k: v for k, v in wrapped.state_dict().items() if "lora_" in k}
    plain.load_state_dict(adapters, strict=False)
    assert torch.equal(tiny.output(model, "llama"), tiny.output(plain.get_base_model(), "llama"))


def test_an_adapter_that_goes_leaves_the_edit_as_it_was():
    model = tiny.build("llama")
    handle = scrambled(fe.patch(model, fe.RED()))
    said, paths = tiny.output(model, "llama"), [type(m) for m in model.modules()]
    wrapped = lora(model, ["down_proj"])
    assert not torch.allclose(tiny.output(model, "llama"), said)
    wrapped.unload()
    assert torch.equal(tiny.output(model, "llama"), said) and [type(m) for m in model.modules()] == paths
    assert {row["path"] for row in handle.report().rows} == {"fused"}
    other = copy.deepcopy(model)
    assert torch.equal(tiny.output(other, "llama"), said)
