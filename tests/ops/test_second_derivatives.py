"""Derivatives of derivatives, and torch.func, over the ops and patched models: autograd's of the plain expression."""

import copy

import pytest
import tiny_models as tiny
import torch
from fastedit.kernels import reference
from patch_cases import scrambled
from torch.autograd import forward_ad
from torch.func import functional_call

import fastedit as fe
from fastedit import ops

ROWS, WIDTH, RANK = 5, 8, 2
FORM = ("scale", "bias", "read", "offset", "write")


def given(dtype=torch.float32, slots=None):
    g = torch.Generator().manual_seed(3)
    lead = () if slots is None else (slots,)
    shapes = {"x": (ROWS, WIDTH), "residual": (ROWS, WIDTH), "weight": (WIDTH,), "norm_bias": (WIDTH,), "scale": (*lead, WIDTH),
              "bias": (*lead, WIDTH), "read": (*lead, RANK, WIDTH), "offset": (*lead, RANK), "write": (*lead, RANK, WIDTH),
              "strength": (ROWS,)}  # fmt: skip
    return {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}


def ours(op, t, names, slot=None, **more):
    form = {name: t[name] for name in names if name in (*FORM, "strength")}
    if op == "edit":
        return ops.edit(t["x"], **form, slot=slot)
    if op == "project":
        return ops.project(t["x"], t["read"], t["offset"])
    if op == "edit_add":
        return ops.edit_add(t["x"], t["residual"], **form, slot=slot, **more)
    bias = t["norm_bias"] if more["kind"] == "layer" else None
    return torch.cat(ops.edit_add_norm(t["x"], t["residual"], t["weight"], norm_bias=bias, **form, slot=slot, **more))


def plain(op, t, names, slot=None, on="x", kind="rms"):
    """The same in operations that autograd knows."""
    form = [t[name] if name in names else None for name in FORM]
    k = t["strength"] if "strength" in names else None
    if op == "edit":
        return reference.edit(t["x"], *form, slot, k)[0]
    if op == "project":
        return t["x"] @ t["read"].T + t["offset"]
    if op == "edit_add":
        return reference.edit_add(t["x"], t["residual"], *form, slot, k, on == "sum")[0]
    code = ("rms", "gemma", "layer").index(kind)
    bias = t["norm_bias"] if kind == "layer" else None
    out = reference.edit_add_norm(t["x"], t["residual"], t["weight"], bias, *form, slot, k, on == "sum", code)
    return torch.cat(out[:2])


CASES = [
    ("edit", FORM, {}), ("edit", ("bias",), {}), ("edit", ("scale", "bias", "strength"), {}),
    ("edit", (*FORM, "strength"), {"slot": [0, 1, -1, 1, 0]}), ("edit", ("read", "offset", "write"), {}),
    ("project", ("read", "offset"), {}),
    ("edit_add", FORM, {"on": "x"}), ("edit_add", FORM, {"on": "sum"}), ("edit_add", ("read", "offset", "write"), {"on": "sum"}),
    ("edit_add", (*FORM, "strength"), {"on": "sum", "slot": [0, 1, -1, 1, 0]}),
    ("edit_add_norm", ("scale", "bias"), {"on": "x", "kind": "rms"}), ("edit_add_norm", FORM, {"on": "sum", "kind": "layer"}),
    ("edit_add_norm", ("read", "offset", "write"), {"on": "sum", "kind": "gemma"}),
]  # fmt: skip


@pytest.mark.parametrize("op, names, more", CASES)
def test_gradients_of_gradients(op, names, more):
    """Of a sum, whose first gradient has a constant in it, and of a function that bends."""
    more, slot = dict(more), None
    if "slot" in more:
        slot = torch.tensor(more.pop("slot"), dtype=torch.int32)
    for bend in (lambda out: out.sum(), lambda out: out.square().sum()):
        found = []
        for call in (ours, plain):
            t = {name: v.requires_grad_() for name, v in given(slots=None if slot is None else 2).items()}
            firsts = torch.autograd.grad(bend(call(op, t, names, slot, **more)), list(t.values()), create_graph=True,
                                         allow_unused=True)  # fmt: skip
            weights = [torch.randn(f.shape, generator=torch.Generator().manual_seed(n))
                       for n, f in enumerate(firsts) if f is not None]  # fmt: skip
            mixed = sum((f * w).sum() for f, w in zip((f for f in firsts if f is not None), weights, strict=True))
            if not mixed.requires_grad:  # the gradient is a constant
                found.append(dict.fromkeys(t, torch.zeros(())))
                continue
            seconds = torch.autograd.grad(mixed, list(t.values()), allow_unused=True, materialize_grads=True)
            found.append(dict(zip(t, (*seconds,), strict=True)))
        assert any(second.abs().max() > 1e-2 for second in found[1].values()) or names == ("bias",)
        for name, second in found[1].items():
            torch.testing.assert_close(found[0][name], second, rtol=1e-4, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_a_hessian_is_not_zero():
    t = given()
    found = torch.autograd.functional.hessian(lambda s: ops.edit(t["x"], s).square().sum(), t["scale"])
    torch.testing.assert_close(found, torch.diag(2 * t["x"].square().sum(0)))


@pytest.mark.parametrize("op, names, more", [case for case in CASES if "slot" not in case[2]])
def test_torch_func_sees_the_ops(op, names, more):
    t = given()

    def of(call):
        return lambda x, scale: call(op, t | {"x": x, "scale": scale}, names, **more)

    def both(transform):
        got, expected = (transform(of(call)) for call in (ours, plain))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        return expected

    x, scale = t["x"], t["scale"]
    both(lambda f: torch.func.jvp(f, (x, scale), (x + 1, scale - 1)))
    both(lambda f: (torch.func.vmap(f)(torch.stack([x, 2 * x, -x]), torch.stack([scale, scale + 1, -scale])),))
    both(lambda f: torch.func.grad(lambda *a: f(*a).square().sum(), argnums=(0, 1))(x, scale))
    (hessian,) = both(lambda f: (torch.func.hessian(lambda s: f(x, s).square().sum())(scale),))
    assert hessian.any() == ("scale" in names)


def test_forward_mode_by_hand_keeps_its_tangents():
    t = given()
    with forward_ad.dual_level():
        tangents = []
        for call in (ours, plain):
            dual = t | {"x": forward_ad.make_dual(t["x"], t["residual"])}
            tangents.append(forward_ad.unpack_dual(call("edit", dual, FORM)).tangent)
        torch.testing.assert_close(*tangents)


@pytest.mark.parametrize("op, names, more", CASES)
def test_a_backward_of_gradients_with_tangents_keeps_them(op, names, more):
    """The tangent of a vector-Jacobian product along its vector is the product with that tangent."""
    slots = None if "slot" not in more else torch.tensor(more["slot"], dtype=torch.int32)
    t = given(slots=None if slots is None else 2)
    inputs = [t[n].requires_grad_() for n in ("x", *names)]
    out = ours(op, t, names, **more | ({} if slots is None else {"slot": slots}))
    v, along = torch.randn(2, *out.shape)
    expected = torch.autograd.grad(out, inputs, along, retain_graph=True)
    with forward_ad.dual_level():
        found = torch.autograd.grad(out, inputs, forward_ad.make_dual(v, along))
        for gradient, tangent in zip(found, expected, strict=True):
            torch.testing.assert_close(forward_ad.unpack_dual(gradient).tangent, tangent, rtol=1e-4, atol=1e-4)


# --- models ---------------------------------------------------------------------------------------------------------------


def slow_twin(model, family):
    """The model with its edits in plain hooks, parameters and all."""
    (handle,) = fe.patching.handle.handles(model)
    twin = copy.deepcopy(model)
    fe.patching.handle.handles(twin)[0].remove()
    forms = [(edit.site, layer.index, masters) for edit, layer, masters in handle._each()]
    for site, layer, masters in forms:
        def hook(module, args, out, masters=masters):
            rows = out[0] if isinstance(out, tuple) else out
            edited = reference.edit(rows.flatten(0, -2), *masters.tensors(), None, None)[0].view(rows.shape)
            return (edited, *out[1:]) if isinstance(out, tuple) else edited

        tiny.site_module(twin, family, site, layer).register_forward_hook(hook)
    return twin, handle


def loss_of(model, family):
    out = model.base_model(**tiny.inputs(family)).last_hidden_state if family == "bert" else model(**tiny.inputs(family)).logits
    return out.square().mean()


@pytest.mark.parametrize("edit", [fe.RED, lambda: fe.DiReFT(2, site="mlp"), lambda: fe.NoReFT(2)])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_gradients_of_gradients_of_a_patched_model(family, edit):
    """A penalty on the gradient, as of flat minima and influence functions."""
    model = tiny.build(family, attn_implementation="eager")
    scrambled(fe.patch(model, edit()))
    slow, handle = slow_twin(model, family)
    found = []
    for each in (model, slow):
        parameters = list(handle.parameters())
        firsts = torch.autograd.grad(loss_of(each, family), parameters, create_graph=True)
        penalty = sum(f.square().sum() for f in firsts)
        found.append(torch.autograd.grad(penalty, parameters))
    assert max(float(g.abs().max()) for g in found[1]) > 1e-6
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 1e-3 * b.abs().max() + 1e-7


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_torch_func_sees_a_patched_model(family):
    model = tiny.build(family, attn_implementation="eager")
    handle = scrambled(fe.patch(model, [fe.RED(), fe.Steer(torch.ones(tiny.WIDTH), site="mlp"), fe.NoReFT(2)], freeze=True))
    handle.strength = 0.5
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(parameters):
        inner = _Loss(model, family)
        return functional_call(inner, {f"model.{n}": p for n, p in parameters.items()}, ())

    found = torch.func.grad(loss)(trained)
    loss_of(model, family).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6)
    tangents = {n: torch.ones_like(p) for n, p in trained.items()}
    _, along = torch.func.jvp(loss, (trained,), (tangents,))
    torch.testing.assert_close(along, sum(g.sum() for g in found.values()), rtol=1e-3, atol=1e-5)


class _Loss(torch.nn.Module):
    def __init__(self, model, family):
        super().__init__()
        self.model, self.family = model, family

    def forward(self):
        return loss_of(self.model, self.family)


def test_what_torch_func_cannot_take_is_refused():
    model = tiny.build("llama", attn_implementation="eager")
    fe.patch(model, fe.LoReFT(2), freeze=True)
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(RuntimeError, match=r"kept orthonormal .* torch\.func"):
        torch.func.grad(lambda p: functional_call(_Loss(model, "llama"), {f"model.{n}": t for n, t in p.items()}, ()))(trained)
