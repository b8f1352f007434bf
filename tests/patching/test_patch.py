"""What an edited model computes: on the fused and the plain path, against plain hooks."""

import copy

import pytest
import tiny_models as tiny
import torch
from patch_cases import everything, random_form, scaled_then_low_rank, scrambled, tiny_plain

import fastedit as fe
from fastedit.edits.form import Form
from fastedit.patching.handle import handles

DTYPES = (torch.float32, torch.bfloat16)
PATHS = (True, False)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_identity_edits_leave_the_logits_bits_on_the_plain_path(family):
    model = tiny.build(family)
    before = tiny.output(model, family)
    for site in ("mlp", "attn", "block"):
        with fe.patch(model, fe.ScaleBias(site=site), fused=False) as handle:
            assert torch.equal(tiny.output(model, family), before)
            handle.load_tensors({k: t + 0.5 for k, t in handle.named_tensors().items()})
            assert not torch.equal(tiny.output(model, family), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fused", PATHS)
@pytest.mark.parametrize("site", ["mlp", "attn", "block"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_edit_equals_plain_hooks(family, site, fused, dtype):
    model = tiny.build(family, dtype)
    layers = [0, tiny.number_of_layers(family) - 1]
    first, second = random_form(rank=2, seed=3), random_form(rank=3, seed=4)
    expected = [(site, layer, form) for layer in layers for form in (first, second)]
    eager = tiny.output(tiny.hook_reference(model, family, expected), family)
    reference = tiny.output(tiny.hook_reference(tiny.exact(model), family, expected), family)
    edits = [e for form in (first, second) for e in scaled_then_low_rank(form, site, layers)]
    with tiny.quiet(fe.patch, model, edits, fused=fused):
        tiny.assert_promise(tiny.output(model, family), eager, reference)


@pytest.mark.parametrize("fused", PATHS)
def test_handles_compose_in_order_and_leave_in_any(fused):
    model = tiny.build("llama")
    forms = [random_form(seed=s) for s in (1, 2, 3)]
    placed = [fe.patch(model, scaled_then_low_rank(f, "mlp", [1]), fused=fused) for f in forms]
    for gone in (1, 0, 2):
        expected = [("mlp", 1, f) for f, h in zip(forms, placed, strict=True) if not h.removed]
        eager = tiny.output(tiny.hook_reference(model_without(model), "llama", expected), "llama")
        exact = tiny.output(tiny.hook_reference(tiny.exact(model_without(model)), "llama", expected), "llama")
        tiny.assert_promise(tiny.output(model, "llama"), eager, exact)
        placed[gone].remove()


def model_without(model):
    clean = copy.deepcopy(model)
    for handle in handles(clean):
        handle.remove()
    return clean


def test_more_rank_than_one_kernel_takes_runs_in_several_passes():
    model, g = tiny.build("llama"), torch.Generator().manual_seed(0)
    forms = [
        Form(read=torch.randn(40, 32, generator=g) * 0.05, write=torch.randn(40, 32, generator=g) * 0.05)
        for _ in range(3)
    ]
    for site in ("mlp", "block"):
        expected = [(site, 1, form) for form in forms]
        eager = tiny.output(tiny.hook_reference(model, "llama", expected), "llama")
        exact = tiny.output(tiny.hook_reference(tiny.exact(model), "llama", expected), "llama")
        edits = [fe.LowRank(f.read, None, f.write, site=site, layers=1) for f in forms]
        for fused in PATHS:
            with fe.patch(model, edits, fused=fused):
                tiny.assert_promise(tiny.output(model, "llama"), eager, exact)


def test_an_edit_on_the_ffn_is_applied_once_where_the_blocks_take_several_passes():
    """The norm of the next layer rides on an add whose sum has more rank than one kernel takes."""
    model, g = tiny.build("llama"), torch.Generator().manual_seed(0)
    low = Form(read=torch.randn(40, 32, generator=g) * 0.05, write=torch.randn(40, 32, generator=g) * 0.05)
    scale = torch.rand(32, generator=g) + 0.5
    edits = [fe.ScaleBias(scale), *(fe.LowRank(low.read, None, low.write) for _ in range(2))]
    expected = [("mlp", n, Form(scale=scale)) for n in range(3)] + [("block", n, low) for n in range(3) for _ in range(2)]
    eager, exact = (tiny.output(tiny.hook_reference(m, "llama", expected), "llama") for m in (model, tiny.exact(model)))
    fe.patch(model, edits)
    tiny.assert_promise(tiny.output(model, "llama"), eager, exact)


@pytest.mark.parametrize("fused", PATHS)
def test_strength_is_a_dial(fused):
    model = tiny.build("llama")
    said = tiny.output(model, "llama")
    form = random_form()
    for edits, many in ((scaled_then_low_rank(form, "mlp", None)[:1], False), (everything(), True)):
        handle = scrambled(fe.patch(model, edits, fused=fused))
        full = tiny.output(model, "llama")
        handle.strength = 0.5
        assert handle.strength == 0.5
        half = tiny.output(model, "llama")
        assert not torch.equal(half, full) and not torch.equal(half, said)
        handle.strength = 0.0
        nothing = tiny.output(model, "llama")
        if not fused:
            assert torch.equal(nothing, said) or (many and torch.allclose(nothing, said, atol=1e-5))
        else:
            torch.testing.assert_close(nothing, said)
        handle.strength = 1.0
        assert torch.equal(tiny.output(model, "llama"), full)
        handle.remove()
    with pytest.raises(ValueError, match="finite"):
        fe.patch(model, fe.RED()).strength = float("nan")


@pytest.mark.parametrize("fused", PATHS)
def test_half_strength_is_the_form_dialled_to_it(fused):
    from fastedit.edits.form import at_strength

    model, form = tiny.build("llama"), random_form()
    expected = [("mlp", 1, at_strength(Form(form.scale, form.bias), 0.75))]
    eager = tiny.output(tiny.hook_reference(model, "llama", expected), "llama")
    exact = tiny.output(tiny.hook_reference(tiny.exact(model), "llama", expected), "llama")
    handle = fe.patch(model, fe.ScaleBias(form.scale, form.bias, layers=1, strength=0.5), fused=fused)
    handle.strength = 1.5
    tiny.assert_promise(tiny.output(model, "llama"), eager, exact)


@pytest.mark.parametrize("fused", PATHS)
def test_the_random_state_is_left_alone(fused):
    model = tiny.build("llama")
    before = torch.get_rng_state()
    handle = fe.patch(model, everything(), fused=fused)
    tiny.output(model, "llama")
    handle.remove()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("fused", PATHS)
def test_inference_mode_and_autocast(fused):
    model = tiny.build("llama")
    with torch.inference_mode():
        handle = scrambled(fe.patch(model, everything(), fused=fused))
        inside = tiny.output(model, "llama")
        handle.strength = 0.5
        handle.strength = 1.0
        torch.testing.assert_close(tiny.output(model, "llama"), inside)
    torch.testing.assert_close(tiny.output(model, "llama"), inside, rtol=1e-4, atol=1e-4)
    model(**tiny.inputs("llama")).logits.sum().backward()
    assert all(p.grad is not None for p in handle.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        cast = tiny.output(model, "llama")
        plain = tiny.output(tiny_plain(model), "llama")
    assert cast.dtype is torch.bfloat16
    assert (cast.double() - inside).abs().max() <= 2 * (
        plain.double() - inside
    ).abs().max() + 2**-8 * inside.abs().max()


@pytest.mark.parametrize("fused", PATHS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gradients_equal_those_of_plain_hooks(family, fused):
    model = tiny.build(family)
    form = random_form()
    layers = list(range(tiny.number_of_layers(family)))
    handle = fe.patch(model, fe.ScaleBias(form.scale, form.bias), fused=fused, freeze=True)
    given = tiny.inputs(family)
    model(**given).logits.square().sum().backward()
    slow = tiny.build(family).double()
    masters = []
    for layer in layers:
        pair = [form.scale.double().requires_grad_(), form.bias.double().requires_grad_()]
        masters.append(pair)
        tiny.site_module(slow, family, "mlp", layer).register_forward_hook(
            lambda m, a, o, pair=pair: o * pair[0] + pair[1]
        )
    slow(**given).logits.square().sum().backward()
    for (scale, bias), got in zip(masters, zip(*[iter(handle.parameters())] * 2, strict=True), strict=True):
        for parameter, reference in zip(got, (scale.grad, bias.grad), strict=True):
            assert (parameter.grad - reference).abs().max() <= 1e-4 * reference.abs().max()


def test_peft_and_its_adapters_stay_in_place():
    peft = pytest.importorskip("peft")
    model = tiny.build("llama")
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, init_lora_weights=False)
    )
    before, said = tiny.state(wrapped), tiny.output(wrapped, "llama")
    handle = tiny.quiet(fe.patch, wrapped, fe.RED(), freeze=True)
    torch.testing.assert_close(tiny.output(wrapped, "llama"), said)
    assert {line[3] for line in handle.report().lines()} == {"fused"}
    scrambled(handle)
    assert not torch.allclose(tiny.output(wrapped, "llama"), said)
    wrapped(**tiny.inputs("llama")).logits.sum().backward()
    assert all(p.grad is not None for p in handle.parameters())
    handle.remove()
    wrapped.zero_grad()
    tiny.assert_same_state(wrapped, before)


def test_a_model_generates_the_same_text():
    model, ids = tiny.build("llama"), {"input_ids": torch.tensor([[3, 8, 5]]), "attention_mask": torch.ones(1, 3).long()}

    def told(model):
        torch.manual_seed(0)  # a random model's likeliest token hardly changes
        return model.generate(**ids, max_new_tokens=24, do_sample=True)

    story = told(model)
    with fe.patch(model, [fe.RED(), fe.Steer(torch.zeros(32))]) as handle:
        assert torch.equal(told(model), story)
        scrambled(handle)
        changed = told(model)
        assert not torch.equal(changed, story)
        (plain,) = [tiny_plain(model)]
        assert torch.equal(told(plain), changed)
    assert torch.equal(told(model), story)


def test_new_memory_is_seen_where_edits_are_folded():
    model = tiny.build("llama")
    handle = fe.patch(model, [fe.LoReFT(2), fe.RED(site="block"), fe.NoReFT(2, seed=1)])
    before = tiny.output(model, "llama")
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.data = torch.randn_like(parameter) * 0.3 + parameter.data
    after = tiny.output(model, "llama")
    other = tiny.build("llama")
    again = fe.patch(other, [fe.LoReFT(2), fe.RED(site="block"), fe.NoReFT(2, seed=1)])
    again.load_tensors(handle.named_tensors())
    torch.testing.assert_close(after, tiny.output(other, "llama"), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after, before, atol=1e-2)
