"""adopt, with repeng and steering-vectors, which `make peers` installs; each test skips where they are not installed."""

import contextlib
import importlib.util

import numpy as np
import pytest
import tiny_models as tiny
import torch
from peer_cases import DTYPES, compare, needs, vectors
from word_tokenizer import tokenizer

import fastedit as fe

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
    from fastedit.edits.form import Form

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


def test_after_repengs_own_training():
    """Training asks for hidden states: transformers then leaves hooks on every layer, which only record."""
    model = controlled([0, 2])
    said = tokenizer()
    from repeng import ControlVector, DatasetEntry

    words = ("cat", "dog", "mat", "red")
    entries = [DatasetEntry(positive=f"the {word} is good", negative=f"the {word} is bad") for word in words]
    model.reset()
    trained = ControlVector.train(model, said, entries, hidden_layers=[0, 2], batch_size=2)
    assert model.model.model.layers[0].block._forward_hooks
    model.set_control(trained, 3.0)
    eager, before = control_output(model), tiny.state(model)
    handle = fe.adopt(model)
    torch.testing.assert_close(control_output(model), eager, rtol=1e-4, atol=1e-4)
    assert len(handle.adopted) == 2
    handle.strength = 0.0
    assert not torch.allclose(control_output(model), eager, atol=1e-3)
    handle.remove()
    tiny.assert_same_state(model, before)
    assert torch.equal(control_output(model), eager)


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
