"""A dial that moves between a forward and its backward: the strength of the forward is the backward's."""

import copy

import pytest
import tiny_models as tiny
import torch
from patch_cases import scrambled
from torch.utils.checkpoint import checkpoint

import fastedit as fe

V = torch.randn(tiny.WIDTH, generator=torch.Generator().manual_seed(4))
PLANE = torch.randn(2, tiny.WIDTH, generator=torch.Generator().manual_seed(5))


def gated(**more):
    return fe.Ablate(PLANE, site="block").when(fe.Gate(V / V.norm(), 0.1, sharpness=3.0, **more))


EDITS = {
    "red": fe.RED,
    "steer": lambda: fe.Steer(V, site="mlp"),
    "frozen stack": lambda: [fe.Amplify(V, 1.7, site="block"), fe.Ablate(PLANE, site="block")],
    "trained stack": lambda: [fe.RED(), fe.NoReFT(2, site="mlp")],
    "loreft": lambda: fe.LoReFT(2),
    "positions": lambda: [fe.RED(positions="first 3"), fe.DiReFT(2, positions="first 2")],
    "gate": gated,
    "keep_norm": lambda: fe.Amplify(V, 2.0, keep_norm=True),
}

CASES = [("llama", kind) for kind in EDITS] + [
    ("gpt2", "red"), ("gpt2", "gate"), ("bert", "frozen stack"), ("bert", "keep_norm"), ("t5", "red"), ("t5", "loreft"),
]  # fmt: skip


def model_with(family, kind, fused=True, changes=None, **options):
    changes = (changes or {}) | ({"dropout_rate": 0.0} if family == "t5" else {})
    model = tiny.build(family, **changes)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    return model, scrambled(fe.patch(model, EDITS[kind](), fused=fused, **options))


def loss_of(model, family):
    given = tiny.inputs(family)
    if family == "bert":
        return model.base_model(**given).last_hidden_state.square().mean()
    return model(**given, use_cache=False).logits.square().mean()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def alone(model, handle, family, strength):
    handle.strength = strength
    return gradients(model, loss_of(model, family))


def check_moved(model, handle, family, expected):
    """Two losses at two strengths, one backward; and one, at a strength that is neither's."""
    handle.strength = 1.0
    up = loss_of(model, family)
    handle.strength = -0.5
    down = loss_of(model, family)
    handle.strength = 0.25
    found = gradients(model, up - down)
    assert found.keys() == expected.keys() and len(found) > 10
    for name, gradient in expected.items():
        apart = (found[name] - gradient).abs().max()
        assert apart <= 1e-4 * gradient.abs().max() + 1e-7, f"{name}: {apart} of {gradient.abs().max()}"


def difference(family, kind, fused=True, **options):
    model, handle = model_with(family, kind, fused, **options)
    one, other = (alone(model, handle, family, strength) for strength in (1.0, -0.5))
    apart = {name: one[name] - other[name] for name in one}
    assert max(float(g.abs().max() / one[name].abs().max().clamp(min=1e-9)) for name, g in apart.items()) > 0.05
    return apart


@pytest.mark.parametrize("family, kind", CASES)
def test_a_backward_has_its_forward_s_strength(family, kind):
    for fused in (True, False) if family == "llama" else (True,):
        expected = difference(family, kind, fused)
        check_moved(*model_with(family, kind, fused), family, expected)
    model, handle = model_with(family, kind)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    check_moved(model, handle, family, expected)


@pytest.mark.parametrize("kind", ["red", "frozen stack", "positions"])
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_a_reentrant_recomputation_has_it_too(family, kind):
    model, handle = model_with(family, kind)
    model.train().gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    check_moved(model, handle, family, difference(family, kind))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_tenants_and_copies_have_it_too(family, checkpointing):
    model, handle = model_with(family, "red", tenants=2)
    with handle.assign([0, 1]):
        one, other = (alone(model, handle, family, strength) for strength in (1.0, -0.5))
    twin = copy.deepcopy(model)
    if checkpointing:
        twin.train().gradient_checkpointing_enable({"use_reentrant": False})
    (again,) = fe.patching.handle.handles(twin)
    with again.assign([0, 1]):
        check_moved(twin, again, family, {name: one[name] - other[name] for name in one})


def test_a_compiled_backward_has_it_too():
    torch._dynamo.reset()
    model, handle = model_with("llama", "red", changes={"num_hidden_layers": 1})
    expected = [alone(model, handle, "llama", strength) for strength in (1.0, -0.5)]
    frames = []

    def backend(graph, given):
        from torch._dynamo.backends.debugging import aot_eager

        frames.append(graph)
        return aot_eager(graph, given)

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    apart = {n: expected[0][n] - expected[1][n] for n in expected[0]}
    handle.strength = 1.0
    up = loss_of(compiled, "llama")
    handle.strength = -0.5
    down = loss_of(compiled, "llama")
    found = gradients(model, up - down)
    for name, gradient in apart.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)
    assert len(frames) == 1, "the dial compiled the model again"


def by_hand(model, reentrant):
    states = torch.randn(2, 4, tiny.WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rope, out = model.model.rotary_emb(states, torch.arange(4)[None]), states
    for layer in model.model.layers:
        out = checkpoint(lambda h, layer=layer: layer(h, position_embeddings=rope), out, use_reentrant=reentrant)
    return out.square().mean()


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_by_hand_refuses_what_it_cannot_know(reentrant):
    model, handle = model_with("llama", "red")
    for strength in (1.0, 0.5, -1.0):  # one at a time: that is sure
        handle.strength = strength
        by_hand(model, reentrant).backward()
    handle.strength = 1.0
    up = by_hand(model, reentrant)
    handle.strength = -1.0
    with pytest.raises(RuntimeError, match="different strengths"):
        up.backward()
    handle.strength = 0.5  # nor do the layers refuse that the refused backward did not come to
    by_hand(model, reentrant).backward()
    model, handle = model_with("llama", "red")  # after a refusal, graphs of before it may still be about
    handle.strength = -1.0
    up = by_hand(model, reentrant)
    handle.strength = 0.0
    with torch.inference_mode():
        tiny.output(model, "llama")
    handle.strength = -1.0
    up.backward()


@pytest.mark.parametrize("change", [
    lambda model, handle: handle.remove(), lambda model, handle: fe.patch(model, fe.Steer(V)),
])  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_edits_that_come_or_go_before_the_backward_are_refused(family, change):
    model, handle = model_with(family, "red")
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    loss = loss_of(model, family)
    change(model, handle)
    with pytest.raises(RuntimeError, match="between a forward and its backward"):
        loss.backward()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda **more: fe.ScaleBias(1 + 0.3 * V, V, **more), lambda **more: fe.ScaleBias(1 + 0.3 * V, trainable=False, **more),
        lambda **more: fe.Steer(V, site="mlp", **more), lambda **more: [fe.ScaleBias(None, V, **more), fe.Steer(V, site="mlp")],
    ],
)  # fmt: skip
def test_an_edit_s_own_strength_counts_from_the_start(make, fused):
    """Trainable or not, before any dial is turned: as one of strength 1 that is dialled there; and so do its gradients."""
    model, given = tiny.build("llama"), tiny.inputs("llama")

    def said(handle):
        logits = model(**given).logits
        grads = [p for p in handle.parameters() if p.requires_grad]
        return logits, [g * 1.0 for g in torch.autograd.grad(logits.square().sum(), grads, allow_unused=True)] if grads else []

    for strength in (0.0, 0.5, -1.0):
        with fe.patch(model, make(strength=strength), fused=fused) as handle:
            found, gradients = said(handle)
        with fe.patch(model, make(), fused=fused) as handle:
            full = said(handle)[0]
            for edit, _, masters in handle._each():
                masters.set_strength(1.0 if isinstance(edit, fe.Steer) and isinstance(make(), list) else strength)
            expected, exact = said(handle)
        assert torch.equal(found, expected) and not torch.allclose(found, full, atol=1e-4)
        assert all(torch.equal(a, b) for a, b in zip(gradients, exact, strict=True))
