"""The proof of a fused forward, and layers whose forward or class others have changed."""

import warnings

import pytest
import tiny_models as tiny
import torch
from patch_cases import everything, paths, random_form, scaled_then_low_rank, scrambled, tiny_plain

import fastedit as fe
from fastedit.patching.handle import handles

# --- the proof ----------------------------------------------------------------------------------------------


def altered(change):
    """A tiny Llama whose layers' class is changed by `change(namespace)`."""
    model = tiny.build("llama")
    layer = type(model.model.layers[0])

    class Altered(layer):
        pass

    change(Altered, layer)
    for module in model.model.layers:
        module.__class__ = Altered
    return model


NAMES = ("attention_mask", "position_ids", "past_key_values", "use_cache", "position_embeddings")


def scaled_residual(cls, layer):
    def forward(
        self, hidden_states, attention_mask=None, position_ids=None, past_key_values=None, use_cache=False,
        position_embeddings=None, **kwargs,
    ):  # fmt: skip
        given = {name: value for name, value in locals().items() if name in NAMES}
        return layer.forward(self, hidden_states, **given, **kwargs) * 1.001

    cls.forward = forward


def other_argument(cls, layer):
    def forward(
        self, hidden_states, gain=1.0, attention_mask=None, position_ids=None, past_key_values=None,
        use_cache=False, position_embeddings=None, **kwargs,
    ):  # fmt: skip
        given = {name: value for name, value in locals().items() if name in NAMES}
        return layer.forward(self, hidden_states, **given, **kwargs) * gain

    cls.forward = forward


def reading_a_weight(cls, layer):
    def forward(
        self, hidden_states, attention_mask=None, position_ids=None, past_key_values=None, use_cache=False,
        position_embeddings=None, **kwargs,
    ):  # fmt: skip
        given = {name: value for name, value in locals().items() if name in NAMES}
        hidden_states = hidden_states + 0 * self.mlp.down_proj.weight.sum()
        return layer.forward(self, hidden_states, **given, **kwargs)

    cls.forward = forward


def without_mask(cls, layer):
    def forward(
        self, hidden_states, attention_mask=None, position_ids=None, past_key_values=None, use_cache=False,
        position_embeddings=None, **kwargs,
    ):  # fmt: skip
        given = {name: value for name, value in locals().items() if name in NAMES[1:]}
        return layer.forward(self, hidden_states, **given, **kwargs)

    cls.forward = forward


@pytest.mark.parametrize("change, says", [
    (scaled_residual, "outputs differ by"), (other_argument, "could not run"),
    (reading_a_weight, "could not run"),
    (without_mask, "other arguments"),
])  # fmt: skip
def test_a_layer_that_differs_takes_the_plain_path_and_says_why(change, says):
    model, form = altered(change), random_form()
    with pytest.warns(UserWarning, match=says):
        handle = fe.patch(model, scaled_then_low_rank(form, "mlp", None))
    assert paths(handle)["mlp"].startswith("plain: ")
    slow = altered(change)
    for layer in slow.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda m, a, o: form(o))
    torch.testing.assert_close(tiny.output(model, "llama"), tiny.output(slow, "llama"), rtol=1e-4, atol=1e-4)


def test_a_norm_that_differs_is_called_and_not_replaced():
    model = tiny.build("llama")
    norm = type(model.model.norm)

    class Odd(norm):
        def forward(self, hidden):
            return super().forward(hidden) + 0.01

    for layer in model.model.layers:
        layer.post_attention_layernorm.__class__ = Odd
    handle = tiny.quiet(fe.patch, model, fe.RED())
    assert paths(handle) == {"mlp": "fused"}
    torch.testing.assert_close(
        tiny.output(model, "llama"), tiny.output(tiny_plain(model), "llama"), rtol=1e-5, atol=1e-5
    )


def test_the_proof_needs_no_weights_and_changes_nothing():
    with torch.device("meta"):
        model = tiny.MODELS["llama"](tiny.config("llama"))
    before, random = tiny.state(model), torch.get_rng_state()
    handle = tiny.quiet(fe.patch, model, everything())
    assert set(paths(handle).values()) == {"fused"}
    assert torch.equal(torch.get_rng_state(), random)
    handle.remove()
    tiny.assert_same_state(model, before)


@pytest.mark.parametrize("name, changes, fused", [
    ("Mistral", {}, True), ("Qwen2", {}, True), ("Qwen3", {"head_dim": 8}, True),
    ("Gemma", {"head_dim": 8}, True), ("Gemma2", {"head_dim": 8}, False),
    ("Granite", {"residual_multiplier": 0.5}, False),
    ("Mixtral", {"num_local_experts": 2}, True),
    ("Phi", {}, None), ("Olmo2", {}, False), ("Cohere", {}, False),
])  # fmt: skip
def test_relatives_of_llama_are_judged_by_the_proof(name, changes, fused):
    transformers = pytest.importorskip("transformers")
    base = tiny._COMMON | {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = getattr(transformers, f"{name}Config")(
        **base | {"num_key_value_heads": 2, "max_position_embeddings": 64} | changes
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    said = tiny.output(model, "llama")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        handle = fe.patch(model, [fe.ScaleBias(site=site) for site in ("mlp", "attn", "block")])
    caught = [str(w.message) for w in caught if "fastedit" in str(w.message)]
    torch.testing.assert_close(tiny.output(model, "llama"), said, rtol=1e-4, atol=1e-5)
    scrambled(handle)
    torch.testing.assert_close(
        tiny.output(model, "llama"), tiny.output(tiny_plain(model), "llama"), rtol=1e-4, atol=1e-5
    )
    found = set(paths(handle).values()) == {"fused"}
    if fused is not None:
        assert found == fused and bool(caught) == (name == "Cohere"), caught  # others say what no add carries
    handle.remove()
    assert torch.equal(tiny.output(model, "llama"), said)


# --- other owners of the forward ----------------------------------------------------------------------------


def test_accelerate_hooks_keep_working():
    accelerate = pytest.importorskip("accelerate.hooks")
    model = tiny.build("llama")
    said = tiny.output(model, "llama")
    calls = []

    class Watch(accelerate.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(type(module).__name__)
            return args, kwargs

    for layer in model.model.layers[:2]:
        accelerate.add_hook_to_module(layer, Watch())
        accelerate.add_hook_to_module(layer.mlp.down_proj, Watch())
    before = tiny.state(model)
    forwards = [layer._old_forward for layer in model.model.layers[:2]]
    handle = scrambled(tiny.quiet(fe.patch, model, fe.RED()))
    edited = tiny.output(model, "llama")
    assert set(paths(handle).values()) == {"fused"} and len(calls) == 4
    assert not torch.allclose(edited, said)
    torch.testing.assert_close(edited, tiny.output(tiny_plain_of(model), "llama"), rtol=1e-5, atol=1e-5)
    handle.remove()
    assert [layer._old_forward for layer in model.model.layers[:2]] == forwards
    tiny.assert_same_state(model, before)
    calls.clear()
    assert torch.equal(tiny.output(model, "llama"), said) and len(calls) == 4


def tiny_plain_of(model):
    """The same edits on a model of its own, plain."""
    (handle,) = handles(model)
    other = tiny.build("llama")
    fe.patch(other, handle.edits, fused=False).load_tensors(handle.named_tensors())
    return other


def test_a_forward_of_the_instance_means_the_plain_path():
    model = tiny.build("llama")
    layer, linear = model.model.layers[1], model.model.layers[2].mlp.down_proj
    layer.forward = lambda *a, forward=layer.forward, **k: forward(*a, **k) * 2
    linear.forward = lambda x, forward=linear.forward: forward(x) * 2
    before, said = tiny.state(model), tiny.output(model, "llama")
    handle = fe.patch(model, [fe.RED(), fe.Steer(torch.ones(tiny.WIDTH))])
    rows = {(r["layer"], r["site"]): r["path"] for r in handle.report().rows}
    assert "replaced on the instance" in rows[1, "mlp"] and rows[0, "mlp"] == "fused"
    handle.strength = 0.0
    torch.testing.assert_close(tiny.output(model, "llama"), said)
    handle.strength = 1.0
    torch.testing.assert_close(
        tiny.output(model, "llama"), tiny.output(tiny_hooked(model), "llama"), rtol=1e-5, atol=1e-5
    )
    handle.remove()
    tiny.assert_same_state(model, before)


def tiny_hooked(model):
    """Steering by ones, by hooks."""
    other = tiny.build("llama")
    layer, linear = other.model.layers[1], other.model.layers[2].mlp.down_proj
    layer.forward = lambda *a, forward=layer.forward, **k: forward(*a, **k) * 2
    linear.forward = lambda x, forward=linear.forward: forward(x) * 2
    for layer in other.model.layers:
        layer.register_forward_hook(lambda m, a, o: o + 1)
    return other


def test_a_class_put_on_top_of_ours_survives_removal():
    model = tiny.build("llama")
    said = tiny.output(model, "llama")
    handle = scrambled(fe.patch(model, fe.RED()))
    layer = model.model.layers[1]
    layer.__class__ = type("Sharded", (type(layer),), {})
    assert not torch.allclose(tiny.output(model, "llama"), said)
    handle.remove()
    assert torch.equal(tiny.output(model, "llama"), said)
    assert type(layer).__name__ == "Sharded"
