"""Patching: what an edited model computes, and that the model comes back bit for bit."""

import copy
import io
import re

import pytest
import tiny_models as tiny
import torch
from patch_cases import everything, random_form, scaled_then_low_rank, scrambled, tiny_plain

import fastedit as fe
from fastedit import installation
from fastedit.form import Form
from fastedit.patching import handles

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
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_removal_gives_every_bit_back(family, fused):
    model = tiny.build(family)
    seen = []
    for module in model.modules():  # other people's hooks, everywhere
        module.register_forward_hook(lambda m, a, o: seen.append(type(m)))
    before, said = tiny.state(model), tiny.output(model, family)
    first = fe.patch(model, everything(), freeze=True, fused=fused)
    second = scrambled(fe.patch(model, fe.ScaleBias(site="block"), fused=fused))
    assert not torch.equal(tiny.output(model, family), said)
    first.remove()
    assert [handle.name for handle in handles(model)] == [second.name]
    second.remove()
    tiny.assert_same_state(model, before)
    seen.clear()
    assert torch.equal(tiny.output(model, family), said) and seen
    second.remove()
    with pytest.raises(RuntimeError, match="was removed"):
        second.strength = 1.0


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


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_copies_and_pickles_are_models_of_their_own(family):
    model = tiny.build(family)
    scrambled(fe.patch(model, everything()))
    said = tiny.output(model, family)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(tiny.output(other, family), said)
        assert [type(m).__qualname__ for m in other.modules()] == [
            type(m).__qualname__ for m in model.modules()
        ]
        (handle,) = handles(other)
        handle.strength = 0.0
        assert torch.equal(tiny.output(model, family), said), "the copy's dial turned the original's"
        assert not torch.equal(tiny.output(other, family), said)
        handle.remove()
        assert not any(key.startswith("fastedit") for key in other.state_dict())
        assert torch.equal(tiny.output(model, family), said)


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
    from fastedit.form import at_strength

    model, form = tiny.build("llama"), random_form()
    expected = [("mlp", 1, at_strength(Form(form.scale, form.bias), 0.75))]
    eager = tiny.output(tiny.hook_reference(model, "llama", expected), "llama")
    exact = tiny.output(tiny.hook_reference(tiny.exact(model), "llama", expected), "llama")
    handle = fe.patch(model, fe.ScaleBias(form.scale, form.bias, layers=1, strength=0.5), fused=fused)
    handle.strength = 1.5
    tiny.assert_promise(tiny.output(model, "llama"), eager, exact)


@pytest.mark.parametrize("change", [
    lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(), lambda m: m.to(torch.float16),
    lambda m: m.to("cpu", torch.bfloat16),
])  # fmt: skip
def test_masters_stay_fp32(change):
    model = tiny.build("llama")
    handle = scrambled(fe.patch(model, [fe.RED(), fe.Steer(torch.randn(tiny.WIDTH))]))
    before = {k: t.clone() for k, t in handle.named_tensors().items()}
    change(model)
    after = handle.named_tensors()
    assert all(t.dtype is torch.float32 and torch.equal(t, before[k]) for k, t in after.items())
    assert next(model.model.parameters()).dtype is not torch.float32
    assert tiny.output(model, "llama").isfinite().all()


def test_masters_follow_their_model_to_its_device():
    model = tiny.build("llama")
    handle = fe.patch(model, [fe.RED(), fe.Steer(torch.randn(tiny.WIDTH))])
    model.to("meta")
    assert all(t.is_meta and t.dtype is torch.float32 for t in handle.named_tensors().values())
    assert model(torch.zeros(2, 3, dtype=torch.long, device="meta")).logits.is_meta
    model.to_empty(device="cpu")
    assert all(t.device.type == "cpu" and t.dtype is torch.float32 for t in handle.named_tensors().values())


@pytest.mark.parametrize("edit, error, says", [
    (lambda: fe.ScaleBias(torch.ones(16), site="mlp", layers=2), ValueError,
     "width 16, but site 'mlp' of layer layers.2 is 32 wide"),
    (lambda: fe.Steer(torch.randn(4, 32)), ValueError, "holds 4 layers, but the model has 3"),
    (lambda: fe.Steer({7: torch.randn(32)}), ValueError, "no layer 7: the model has 3 layers"),
    (lambda: fe.RED(layers=[0, -4]), ValueError, "no layer -4"),
    (lambda: fe.RED(layers="decoder"), ValueError, "no layer 'decoder'"),
    (lambda: "RED", TypeError, "expected an Edit"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_changes(edit, error, says):
    model = tiny.build("llama")
    before = tiny.state(model)
    with pytest.raises(error, match=says):
        fe.patch(model, [fe.RED(), edit()], freeze=True)
    tiny.assert_same_state(model, before)


@pytest.mark.parametrize("number", [1, 4, 6])
def test_a_failure_half_way_is_undone(number, monkeypatch):
    model = tiny.build("llama")
    first = scrambled(fe.patch(model, fe.RED()))
    before, said, calls = tiny.state(model), tiny.output(model, "llama"), []

    def failing(*args, real=installation.swap):
        calls.append(args)
        if len(calls) == number:
            raise MemoryError("no room")
        return real(*args)

    monkeypatch.setattr(installation, "swap", failing)
    with pytest.raises(MemoryError):
        fe.patch(model, everything(), freeze=True)
    tiny.assert_same_state(model, before)
    assert handles(model) == [first] and torch.equal(tiny.output(model, "llama"), said)


def test_a_model_with_nothing_to_patch_says_what_was_looked_for():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(ValueError, match="looked for a ModuleList"):
        fe.patch(model, fe.RED())
    assert not hasattr(model, "fastedit")


def test_a_foreign_attribute_and_a_patched_submodule_are_in_the_way():
    model = tiny.build("llama")
    model.fastedit = 3
    with pytest.raises(ValueError, match="already has an attribute"):
        fe.patch(model, fe.RED())
    del model.fastedit
    inner = fe.patch(model.model, fe.RED())
    with pytest.raises(ValueError, match="'model' is already patched"):
        fe.patch(model, fe.RED())
    inner.remove()
    fe.patch(model, fe.RED()).remove()


def test_freeze_leaves_the_edits_and_a_task_head():
    model = tiny.build("bert")
    for parameter in model.bert.embeddings.parameters():
        parameter.requires_grad_(False)
    before = tiny.state(model)
    first, second = fe.patch(model, fe.RED(), freeze=True), fe.patch(model, fe.RED(), freeze=True)
    trainable = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"fastedit", "classifier"}
    first.remove()
    assert not model.bert.encoder.layer[0].output.dense.weight.requires_grad
    second.remove()
    tiny.assert_same_state(model, before)


def test_without_freeze_nothing_is_frozen():
    model = tiny.build("bert")
    fe.patch(model, fe.RED())
    assert all(p.requires_grad for p in model.parameters())


def test_tensors_are_loaded_whole_or_not_at_all():
    model = tiny.build("llama")
    handle = scrambled(fe.patch(model, [fe.RED(), fe.DiReFT(2)]))
    own = {k: t.clone() for k, t in handle.named_tensors().items()}
    assert next(iter(own)) == "0.layers.0.mlp.scale" and "1.layers.2.block.offset" in own
    name = "1.layers.2.block.offset"
    for changed, error in (
        ({k: t for k, t in own.items() if k != name}, KeyError), ({**own, "2.x": own[name]}, KeyError),
        ({**own, name: torch.zeros(3)}, ValueError),
        ({**own, name: torch.zeros(2, dtype=torch.int64)}, TypeError),
        ({**own, name: torch.tensor([0.0, float("nan")])}, ValueError),
    ):  # fmt: skip
        with pytest.raises(error, match=r"2\.x|offset"):
            handle.load_tensors(
                {k: t + 1 if t.is_floating_point() and k != name else t for k, t in changed.items()}
            )
        assert all(torch.equal(t, own[k]) for k, t in handle.named_tensors().items())


def test_names_in_the_state_dict_are_those_of_the_tensors():
    model = tiny.build("t5")
    handle = fe.patch(model, [fe.RED(), fe.Steer(torch.ones(tiny.WIDTH), layers=[1, -1])])
    names = set(handle.named_tensors())
    assert {
        "0.encoder.1.mlp.scale",
        "0.decoder.0.mlp.bias",
        "1.encoder.1.block.bias",
        "1.decoder.1.block.bias",
    } <= names
    assert {k for k in model.state_dict() if k.startswith("fastedit.")} == {
        f"fastedit.{handle.name}.{n}" for n in names
    }
    assert handle.num_parameters() == sum(t.numel() for t in handle.named_tensors().values())
    assert len(list(handle.parameters())) == 2 * 4


def test_a_saved_state_dict_loads_into_a_patched_model():
    model, other = tiny.build("llama"), tiny.build("llama")
    scrambled(fe.patch(model, everything()))
    fe.patch(other, everything())
    other.load_state_dict(model.state_dict())
    assert torch.equal(tiny.output(other, "llama"), tiny.output(model, "llama"))


def test_tensors_put_in_by_functional_call_are_those_that_count():
    model = tiny.build("llama")
    handle = scrambled(fe.patch(model, everything()))
    said = tiny.output(model, "llama")
    other = {k: t + 0.5 for k, t in handle.named_tensors().items()}
    given = {f"fastedit.{handle.name}.{k}": t for k, t in other.items()}
    with torch.no_grad():
        swapped = torch.func.functional_call(model, given, kwargs=tiny.inputs("llama")).logits
    assert torch.equal(tiny.output(model, "llama"), said)
    handle.load_tensors(other)
    assert torch.equal(tiny.output(model, "llama"), swapped) and not torch.equal(swapped, said)


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


def test_a_trained_model_writes_the_same_story(shared):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared / "models" / "stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Once upon a time", return_tensors="pt")
    story = model.generate(**ids, max_new_tokens=24, do_sample=False)
    with fe.patch(model, [fe.RED(), fe.Steer(torch.zeros(64))]) as handle:
        assert torch.equal(model.generate(**ids, max_new_tokens=24, do_sample=False), story)
        scrambled(handle)
        changed = model.generate(**ids, max_new_tokens=24, do_sample=False)
        assert not torch.equal(changed, story)
        (plain,) = [tiny_plain(model)]
        assert torch.equal(plain.generate(**ids, max_new_tokens=24, do_sample=False), changed)
    assert torch.equal(model.generate(**ids, max_new_tokens=24, do_sample=False), story)


def test_the_report_names_everything():
    model = tiny.build("bert")
    handle = fe.patch(model, [fe.RED(), fe.Steer(torch.ones(tiny.WIDTH))])
    lines = list(handle.report().lines())
    assert lines[0][:4] == ("layers.0–2", "mlp", "RED", "fused") and lines[0][5:] == ("192", "768")
    assert lines[1][:3] == ("layers.0–2", "block", "Steer") and "ends in a norm" in lines[1][3]
    assert "backend" in str(handle.report())


def test_plain_path_refuses_hidden_states_of_another_width():
    """The lean entry hands raw addresses to the kernel: a width that is not the edit's must never reach it."""
    from fastedit import lean

    scale, bias = torch.ones(64), torch.zeros(64)
    with torch.no_grad():
        assert torch.equal(lean.edit(torch.ones(3, 64), (scale, bias, None, None, None), None), torch.ones(3, 64))
        with pytest.raises(ValueError, match="64"):
            lean.edit(torch.ones(3, 48), (scale, bias, None, None, None), None)
        with pytest.raises(ValueError, match="64"):
            lean.edit(torch.ones(3, 128), (None, None, torch.ones(2, 64), None, torch.ones(2, 64)), None)
        with pytest.raises(ValueError, match="64"):
            lean.add(torch.ones(3, 128), torch.ones(3, 128), (None, bias, None, None, None), None, False)


@pytest.mark.parametrize(
    "arguments, says",
    [
        ((None, fe.RED()), "model is None, expected a torch.nn.Module"),
        (("gpt2", fe.RED()), "model is 'gpt2'"),
        ((..., fe.RED), "expected an Edit such as"),
    ],
)
def test_what_is_no_model_or_edit_is_said(arguments, says):
    model = tiny.build("llama")
    with pytest.raises(TypeError, match=re.escape(says)):
        fe.patch(*(model if argument is ... else argument for argument in arguments))
    with pytest.raises(TypeError, match="freeze is 'no', expected True or False"):
        fe.patch(model, fe.RED(), freeze="no")
    assert "fastedit" not in model._modules


def test_values_that_are_no_numbers_are_said():
    for value in (None, "abc"):
        with pytest.raises(TypeError, match="expected a tensor"):
            fe.Steer(value)
    with fe.patch(tiny.build("llama"), fe.Steer(torch.ones(tiny.WIDTH), positions="mask")) as handle:
        for strength in ("2", True, None, 1j):
            with pytest.raises(TypeError, match="expected a number"):
                handle.strength = strength
        for call in (handle.mask, handle.prompt):
            with pytest.raises(TypeError, match="expected a tensor"):
                call("a")
        handle.mask(torch.ones(2, 7))
        with pytest.raises(ValueError, match="2 rows, but this forward has 4 sequences"):
            handle.model(torch.ones(4, 7, dtype=torch.long))
    with pytest.raises(ValueError, match="site is one of the model"):
        fe.patch(tiny.build("llama"), fe.Steer(torch.ones(tiny.LAYERS, tiny.WIDTH), site="embed"))


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
