"""adopt, with the neighbours that `make peers` installs; each test skips where its neighbour is not installed."""

import contextlib
import importlib.util

import numpy as np
import pytest
import tiny_models as tiny
import torch

import fastedit as fe

LAYER = {"llama": "model.layers[{}]", "gpt2": "transformer.h[{}]"}
DTYPES = (torch.float32, torch.bfloat16)


def needs(name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs {name}: make peers, then .venv-peers/bin/python -m pytest")
    return importlib.import_module(name)


def vectors(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(tiny.WIDTH, generator=g) * 0.5 for layer in range(tiny.LAYERS)}


def compare(call, adopt, exact_call, path="fused"):
    """What the neighbour says before, during and after adoption; the handle, removed."""
    eager, reference = call(), exact_call()
    handle = tiny.quiet(adopt)
    assert not handle.left
    tiny.assert_promise(call(), eager, reference)
    assert {row["path"] for row in handle.report().rows} == {path}
    handle.strength = 0.0
    assert not torch.allclose(call(), eager)
    handle.remove()
    assert torch.equal(call(), eager)
    return handle


def exactly(family, forms, **site):
    """The exact output of the plain model, with {layer: Form} at a site."""
    from fastedit.form import Form

    wide = [
        (site.get("site", "block"), layer, Form(*(None if t is None else t.double() for t in form.tensors())))
        for layer, form in forms.items()
    ]
    return lambda model: tiny.output(tiny.hook_reference(tiny.exact(model), family, wide), family)


# --- pyvene and pyreft ------------------------------------------------------------------------------------------

KINDS = {
    "Loreft": {}, "Noreft": {"add_bias": True}, "Consreft": {}, "Lobireft": {}, "Direft": {},
    "Nodireft": {"add_bias": True},
}  # fmt: skip


def reft(kind="Loreft", dtype=torch.float32, family="llama", component="", **options):
    pyreft = needs("pyreft")
    options = {"embed_dim": tiny.WIDTH, "low_rank_dimension": 3, "dtype": dtype} | KINDS[kind] | options
    made = [getattr(pyreft, f"{kind}Intervention")(**options) for _ in range(tiny.LAYERS)]
    places = [
        {"component": f"{LAYER[family].format(n)}{component}.output", "low_rank_dimension": 3, "intervention": one}
        for n, one in enumerate(made)
    ]
    torch.manual_seed(0)
    model = pyreft.get_reft_model(tiny.build(family, dtype), pyreft.ReftConfig(representations=places))
    with torch.no_grad():
        for one in made:
            for parameter in one.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.eval()  # which returns nothing
    return model


def said(model, family="llama", **call):
    with torch.no_grad():
        return model(base=tiny.inputs(family), **call)[1].logits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_reft_models_say_the_same(kind, dtype):
    model = reft(kind, dtype)
    exact = reft(kind, dtype)
    for one in exact.interventions.values():
        one.double()
    exact.model = tiny.exact(exact.model)
    hooks = {k: v for k, v in model.intervention_hooks.items()}
    for key, hook in hooks.items():
        path = next(p for p, m in model.model.named_modules() if m is hook.__self__)
        exact.intervention_hooks[key] = exact.model.get_submodule(path).register_forward_hook
    handle = compare(lambda: said(model), lambda: fe.adopt(model), lambda: said(exact))
    assert handle.model is model.model and len(handle.adopted) == tiny.LAYERS


@pytest.mark.parametrize("component", ["", ".mlp", ".mlp.c_proj"])
def test_reft_on_other_components_and_families(component):
    model = reft(family="gpt2", component=component)
    before = said(model, "gpt2")
    with fe.adopt(model) as handle:
        torch.testing.assert_close(said(model, "gpt2"), before, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(tiny.output(handle.model, "gpt2"), before, rtol=1e-4, atol=1e-4)
        assert {row["site"] for row in handle.report().rows} == {"mlp" if component else "block"}
    assert torch.equal(said(model, "gpt2"), before)
    plain = tiny.build("gpt2")
    assert torch.equal(tiny.output(model.model, "gpt2"), tiny.output(plain, "gpt2"))


def test_the_calls_of_an_adopted_reft_model_are_pyvenes():
    model = reft()
    given = tiny.inputs("llama")
    whole = [list(range(7))] * 2
    everywhere = {"sources->base": (None, [whole] * tiny.LAYERS)}
    expected = said(model), said(model, unit_locations=everywhere)
    labelled = model(base=given, labels=given["input_ids"], return_dict=True).intervened_outputs.loss
    story = model.generate(base=given, intervene_on_prompt=True, max_new_tokens=4, do_sample=False)[1]
    handle = fe.adopt(model)
    torch.testing.assert_close(said(model), expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(said(model, unit_locations=everywhere), expected[1], rtol=1e-4, atol=1e-4)
    output = model(base=given, labels=given["input_ids"], return_dict=True)
    torch.testing.assert_close(output.intervened_outputs.loss, labelled, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.generate(base=given, intervene_on_prompt=True, max_new_tokens=4, do_sample=False)[1], story)
    for call in (
        {"unit_locations": {"base": 0}}, {"unit_locations": {"sources->base": (None, [[[0], [0]]] * 3)}},
        {"sources": [given]}, {"output_original_output": True}, {"subspaces": [[[0]] * 2] * 3},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="adopted by fastedit, but"):
            said(model, **call)
    for call in ({}, {"intervene_on_prompt": True, "unit_locations": {"base": 0}}):
        with pytest.raises(ValueError, match="alone"):
            model.generate(base=given, **call)
    handle.remove()
    assert torch.equal(said(model), expected[0])
    assert not torch.allclose(said(model, unit_locations={"base": 0}), expected[0])


def test_each_calls_positions_are_followed():
    model, given = reft(), tiny.inputs("llama")
    rows = [[0, 1, 6], [2, 2, 3]]
    some = {"sources->base": (None, [rows] * tiny.LAYERS)}
    story = {"base": given, "unit_locations": some, "intervene_on_prompt": True, "max_new_tokens": 6, "do_sample": False}
    calls = [
        lambda: said(model, unit_locations=some), lambda: said(model), lambda: model.generate(**story)[1],
    ]  # fmt: skip
    expected = [call() for call in calls]
    assert not torch.allclose(expected[0], expected[1])
    with fe.adopt(model, positions="call"):
        for call, before in zip(calls, expected, strict=True):
            torch.testing.assert_close(call(), before, rtol=1e-4, atol=1e-4)
        for wrong in (
            {"sources->base": (None, [rows, rows, [[0], [0]]])}, {"base": [[[0]]]}, {"base": [[[7], [0]]] * 3},
        ):  # fmt: skip
            with pytest.raises(ValueError, match="unit_locations"):
                said(model, unit_locations=wrong)
        with pytest.raises(ValueError, match="generate was given none"):
            model.generate(base=given, intervene_on_prompt=True)
    assert torch.equal(said(model, unit_locations=some), expected[0])


def test_positions_without_a_counterpart_are_refused():
    model = reft()
    with pytest.raises(ValueError, match="positions='every other' has no counterpart among pyvene's unit_locations"):
        fe.adopt(model, positions="every other")
    with fe.adopt(model, positions="all") as handle:
        assert len(handle.adopted) == tiny.LAYERS


def test_hooks_that_pyvene_would_wipe_survive():
    model, seen = reft(), []
    model.model.lm_head.register_forward_hook(lambda m, a, o: seen.append(1))
    with fe.adopt(model):
        said(model)
        assert seen == [1] and model.model.lm_head._forward_hooks
    said(model)
    assert not model.model.lm_head._forward_hooks, "pyvene keeps hooks now: say so in docs/adopt.md"


def linked(model):
    model._intervention_reverse_link[model.sorted_keys[0]] = "link#0"


def serial(model):
    model.mode = "serial"


def hooked(model):
    model.model.model.layers[1].register_forward_hook(lambda m, a, o: None)


def of_another_act(model):
    next(iter(model.interventions.values())).act_fn = torch.nn.ReLU()


def dropping(model):
    one = next(iter(model.interventions.values()))
    one.dropout.p = 0.5
    one.train()


REFUSED = {
    linked: "linked to another", serial: "serial mode", hooked: "hook that stays on the model runs before it",
    of_another_act: "act_fn is ReLU", dropping: "dropout of 0.5 is active",
}  # fmt: skip


@pytest.mark.parametrize("change", REFUSED)
def test_reft_models_are_adopted_whole_or_not_at_all(change):
    model = reft()
    change(model)
    before = tiny.state(model.model)
    with pytest.raises(ValueError, match=f"(?s)nothing can be adopted.*{REFUSED[change]}"):
        fe.adopt(model)
    tiny.assert_same_state(model.model, before)
    assert type(model) is needs("pyreft").ReftModel


@pytest.mark.parametrize("kind", ["Addition", "Subtraction"])
def test_pyvene_steering(kind):
    pyvene = needs("pyvene")
    model = tiny.build("llama")
    made = [getattr(pyvene, f"{kind}Intervention")(source_representation=v) for v in vectors().values()]
    places = [{"component": f"model.layers[{n}].output", "intervention": one} for n, one in enumerate(made)]
    sign = 1 if kind == "Addition" else -1
    from fastedit.form import Form

    exact = exactly("llama", {n: Form(bias=sign * v) for n, v in vectors().items()})
    carrier = pyvene.IntervenableModel(places, model=model)
    compare(lambda: said(carrier), lambda: fe.adopt(carrier), lambda: exact(tiny.build("llama")))


def test_interventions_of_the_users_own_are_named():
    pyvene = needs("pyvene")

    class Own(pyvene.SourcelessIntervention):
        def forward(self, base, source=None, subspaces=None):
            return base.sin()

    places = [{"component": "model.layers[0].output", "intervention": Own(keep_last_dim=True)}]
    model = pyvene.IntervenableModel(places, model=tiny.build("llama"))
    with pytest.raises(ValueError, match=r"Own at model.layers.0: its formula is not known; adopted are Loreft"):
        fe.adopt(model)


# --- repeng -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def numpy_1_name():
    """repeng 0.4.0 names np.float_ in annotations when it is imported; NumPy 2 has none."""
    np.float_ = np.float64
    try:
        yield
    finally:
        del np.float_


def controlled(layers=range(tiny.LAYERS), dtype=torch.float32, **options):
    if importlib.util.find_spec("repeng") is None:
        pytest.skip("needs repeng: make peers, then .venv-peers/bin/python -m pytest")
    with numpy_1_name():
        from repeng import ControlModel
    model = ControlModel(tiny.build("llama", dtype), list(layers))
    model.set_raw_control({n: v.to(dtype) for n, v in vectors().items()}, **options)
    return model


def control_output(model):
    ids = tiny.inputs("llama")["input_ids"]
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    with torch.no_grad():
        return model(input_ids=ids, position_ids=positions).logits


def exact_control(layers, dtype=torch.float32):
    from fastedit.form import Form

    forms = [("block", n, Form(bias=vectors()[n].to(dtype).double())) for n in layers]
    model = tiny.hook_reference(tiny.exact(tiny.build("llama", dtype)), "llama", forms)
    return lambda: control_output(model)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layers", [range(tiny.LAYERS), [1]], ids=["every layer", "one layer"])
@pytest.mark.parametrize("passed", ["the ControlModel", "the model in it"])
def test_control_models_say_the_same(passed, layers, dtype, tmp_path):
    model = controlled(layers, dtype)
    inner = list(model.model.model.layers)
    adopted = model if passed == "the ControlModel" else model.model
    before = tiny.state(model)
    handle = compare(lambda: control_output(model), lambda: fe.adopt(adopted), exact_control(layers, dtype))
    assert handle.model is model.model and len(handle.adopted) == len(layers)
    tiny.assert_same_state(model, before)
    assert all(a is b for a, b in zip(model.model.model.layers, inner, strict=True))
    with fe.adopt(adopted) as handle:
        handle.save(tmp_path)
    plain = tiny.build("llama", dtype)
    with fe.load(plain, tmp_path):
        torch.testing.assert_close(control_output(plain), control_output(model), rtol=0.05, atol=0.05)


def test_control_models_generate_the_same_behind_padding():
    model = controlled()
    model.model.generation_config.pad_token_id = 0
    given = {k: v.flip(-1) for k, v in tiny.inputs("llama").items()}  # padded on the left
    story = model.generate(**given, max_new_tokens=6, do_sample=False)
    with fe.adopt(model):
        assert torch.equal(model.generate(**given, max_new_tokens=6, do_sample=False), story)
    model.reset()
    assert not torch.equal(model.generate(**given, max_new_tokens=6, do_sample=False), story)


def test_controls_that_are_not_an_addition_are_named_and_left(tmp_path):
    for options, reason in (
        ({"normalize": True}, "keeps the norm"), ({"operator": lambda h, v: h - v}, "operator of its own"),
    ):  # fmt: skip
        model = controlled([0, 2], **options)
        before = tiny.state(model)
        with pytest.raises(ValueError, match=f"(?s)repeng control at model.layers.0: .*{reason}"):
            fe.adopt(model)
        tiny.assert_same_state(model, before)
    model = controlled([0, 2])
    model.model.model.layers[2].params.normalize = True
    eager, before = control_output(model), tiny.state(model)
    with pytest.warns(UserWarning, match="layers.2: normalize=True"):
        handle = fe.adopt(model)
    torch.testing.assert_close(control_output(model), eager, rtol=1e-5, atol=1e-5)
    handle.save(tmp_path)
    handle.remove()
    tiny.assert_same_state(model, before)
    model.reset()
    with pytest.raises(ValueError, match="nothing is set on it"):
        fe.adopt(model)


def test_a_hook_between_block_and_control_keeps_the_control_where_it_is():
    model = controlled([1])
    hook = model.model.model.layers[1].block.register_forward_hook(lambda m, a, o: None)
    with pytest.raises(ValueError, match="runs before it"):
        fe.adopt(model)
    hook.remove()
    fe.adopt(model).remove()


# --- steering-vectors -------------------------------------------------------------------------------------------

OPERATORS = (None, "addition_operator", "ablation_operator", "ablation_then_addition_operator")
MATCH = {
    "llama": {"decoder_block": "model.layers.{num}", "mlp": "model.layers.{num}.mlp",
              "self_attn": "model.layers.{num}.self_attn", "input_layernorm": "model.layers.{num}.input_layernorm"},
    "gpt2": {"decoder_block": "transformer.h.{num}", "mlp": "transformer.h.{num}.mlp",
             "self_attn": "transformer.h.{num}.attn"},
}  # fmt: skip


def steer(model, family="llama", kind="decoder_block", operator=None, seed=0, rounded=torch.float32, **options):
    package = needs("steering_vectors")
    made = {n: v.to(rounded).to(next(model.parameters()).dtype) for n, v in vectors(seed).items()}
    if operator is not None:
        options["operator"] = getattr(importlib.import_module("steering_vectors.steering_operators"), operator)()
    return package.SteeringVector(made, kind).patch_activations(model, layer_config=MATCH[family], **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("family, kind", [(f, k) for f in MATCH for k in ("decoder_block", "mlp", "self_attn")])
def test_steering_hooks_say_the_same(family, kind, operator, dtype):
    model, exact = tiny.build(family, dtype), tiny.exact(tiny.build(family, dtype))
    steer(model, family, kind, operator)
    steer(exact, family, kind, operator, rounded=dtype)
    before = tiny.state(model)
    compare(lambda: tiny.output(model, family), lambda: fe.adopt(model), lambda: tiny.output(exact, family))
    tiny.assert_same_state(model, before)


def test_a_steering_hook_goes_back_between_the_hooks_it_was_between():
    model, seen = tiny.build("llama"), []
    block = model.model.layers[0]
    steer(model)
    block.register_forward_hook(lambda m, a, o: seen.append(o))
    steer(model, seed=1, multiplier=-2.0)
    order = list(block._forward_hooks)
    eager = tiny.output(model, "llama")
    middle = seen[-1].clone()
    with pytest.warns(UserWarning, match=r"layers.0: a hook that stays on the model runs before it"):
        handle = fe.adopt(model)
    assert len(handle.adopted) == 2 * tiny.LAYERS - 1
    torch.testing.assert_close(tiny.output(model, "llama"), eager, rtol=1e-4, atol=1e-5)
    later = block.register_forward_hook(lambda m, a, o: None)
    handle.remove()
    assert list(block._forward_hooks) == [*order, later.id]
    assert torch.equal(tiny.output(model, "llama"), eager) and middle.shape == seen[-1].shape


def test_a_hook_that_its_owner_removes_meanwhile_stays_removed():
    model = tiny.build("llama")
    plain, before = tiny.output(model, "llama"), tiny.state(model)
    owner = steer(model)
    handle = fe.adopt(model)
    owner.remove()
    handle.remove()
    tiny.assert_same_state(model, before)
    assert torch.equal(tiny.output(model, "llama"), plain)
    assert not any(m._forward_hooks_with_kwargs for m in model.modules())


@pytest.mark.parametrize("options, kind, reason", [
    ({"min_token_index": 2}, "decoder_block", "acts at the tokens slice"),
    ({"token_indices": [0, 1]}, "decoder_block", r"acts at the tokens \[0, 1\]"),
    ({"token_indices": torch.ones(7)}, "decoder_block", "acts at the tokens tensor"),
    ({"operator": None}, "input_layernorm", "its output is not a site"),
])  # fmt: skip
def test_steering_hooks_that_cannot_be_adopted_are_named(options, kind, reason):
    model = tiny.build("llama")
    steer(model, kind=kind, **options)
    before = tiny.state(model)
    with pytest.raises(ValueError, match=f"steering-vectors hook on model.layers.0[a-z._]*: .*{reason}"):
        fe.adopt(model)
    tiny.assert_same_state(model, before)


def test_an_operator_of_the_users_own_is_named():
    model = tiny.build("llama")
    needs("steering_vectors").SteeringVector(vectors(), "decoder_block").patch_activations(
        model, layer_config=MATCH["llama"], operator=lambda h, v: h * v
    )
    with pytest.raises(ValueError, match="operator of its own"):
        fe.adopt(model)


def test_dropout_between_the_site_and_the_hooked_module_counts():
    model = tiny.build("gpt2").train()  # GPT-2's dropout is 0.1
    steer(model, "gpt2", "mlp")
    with pytest.raises(ValueError, match="its output is not a site"):
        fe.adopt(model)
    model.eval()
    fe.adopt(model).remove()


# --- several at once --------------------------------------------------------------------------------------------


def test_several_neighbours_on_one_model_keep_their_order():
    peft = pytest.importorskip("peft", reason="needs PEFT")
    pyvene = needs("pyvene")
    model = peft.get_peft_model(
        tiny.build("llama"), peft.IA3Config(target_modules=["down_proj"], feedforward_modules=[])
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3_l" in name:
                parameter.mul_(1.5)
    steer(model.get_base_model(), kind="mlp", operator="ablation_then_addition_operator")
    steer(model.get_base_model(), seed=1)
    places = [
        {"component": f"base_model.model.model.layers[{n}].output",
         "intervention": pyvene.AdditionIntervention(source_representation=v)}
        for n, v in vectors(2).items()
    ]  # fmt: skip
    eager = tiny.output(model.get_base_model(), "llama")
    handle = fe.adopt(model)
    torch.testing.assert_close(tiny.output(model.get_base_model(), "llama"), eager, rtol=1e-4, atol=1e-4)
    kinds = [type(edit).__name__ for edit in handle.edits]
    assert kinds == ["ScaleBias", "Steer", "LowRank", "Steer"] and len(places) == tiny.LAYERS
    handle.remove()
    assert torch.equal(tiny.output(model.get_base_model(), "llama"), eager)
