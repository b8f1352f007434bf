"""adopt, with pyvene and pyreft, which `make peers` installs; each test skips where they are not installed."""

import pytest
import tiny_models as tiny
import torch
from peer_cases import DTYPES, LAYER, compare, exactly, needs, vectors

import fastedit as fe

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


def test_a_call_at_one_position_says_what_follows_it():
    """Adopted as it is, an edit acts everywhere: a call at one position is not answered otherwise, and is told how to be."""
    model, rows = reft(), [[3], [3]]
    given = tiny.inputs("llama")
    with fe.adopt(model):
        with pytest.raises(ValueError, match=r"fe\.adopt\(model, positions='call'\) follows each call's"):
            said(model, unit_locations={"base": [rows] * tiny.LAYERS})
        with pytest.raises(ValueError, match=r"fe\.adopt\(model, positions='call'\)"):
            model.generate(base=given, unit_locations={"base": [rows] * tiny.LAYERS}, intervene_on_prompt=True)
    before = said(model, unit_locations={"base": [rows] * tiny.LAYERS})
    with fe.adopt(model, positions="call"):
        torch.testing.assert_close(said(model, unit_locations={"base": [rows] * tiny.LAYERS}), before, rtol=1e-4, atol=1e-4)


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
    from fastedit.edits.form import Form

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
    with pytest.raises(ValueError, match=r"Own at model.layers.0: its formula is not known; the known ones are Loreft"):
        fe.adopt(model)
