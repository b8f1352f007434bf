"""What the tests of the JAX face share: random input, the plain jnp expressions, gradients against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from oracle import FORM, assert_promise

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
WIDTH = 100
LEAD = (2, 5, 90)  # several blocks of a column sum


def rows(random, lead, dtype, width=WIDTH):
    return jnp.asarray(random.standard_normal((*lead, width)), dtype)


def make_form(random, rank=0, slots=None, width=WIDTH):
    """Parameters of realistic size, as oracle.make_form."""
    lead = () if slots is None else (slots,)

    def normal(*shape):
        return random.standard_normal((*lead, *shape)).astype(np.float32)

    form = dict.fromkeys(FORM)
    form |= {"scale": 1 + 0.3 * normal(width), "bias": normal(width)}
    if rank:
        form |= {"read": normal(rank, width) / width**0.5, "offset": normal(rank)}
        form["write"] = normal(rank, width) / rank**0.5
    return {name: None if p is None else jnp.asarray(p, jnp.float32) for name, p in form.items()}


def strengths(random, lead):
    """One a row: a third 0, a third 1."""
    k = random.random(lead, np.float32) * 2
    k.reshape(-1)[::3], k.reshape(-1)[1::3] = 0, 1
    return jnp.asarray(k)


def same_bits(got, want):
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == want.dtype and got.shape == want.shape
    np.testing.assert_array_equal(*(np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in (got, want)))


def to_torch(array):
    array = np.array(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


# --- the plain expressions ------------------------------------------------------------------------------------


def plain_edit(h, form, strength=None):
    """What a user writes in jnp, promoting to float32 where parameters meet the rows; (h', z)."""
    update, z = h if form["scale"] is None else form["scale"] * h, None
    if form["bias"] is not None:
        update = update + form["bias"]
    if form["read"] is not None:
        z = h.astype(form["read"].dtype) @ form["read"].T + form["offset"]
        update = update + z @ form["write"]
    if strength is not None:
        update = h + (strength if strength.size == 1 else strength[..., None]) * (update - h)
    return update, z


def plain_norm(r, weight, norm_bias, kind, eps):
    x = r if r.dtype == jnp.float64 else r.astype(jnp.float32)
    if kind == "layer":
        x = x - x.mean(-1, keepdims=True)
        x = x * lax.rsqrt((x * x).mean(-1, keepdims=True) + eps)
        return (x * weight.astype(x.dtype) + norm_bias.astype(x.dtype)).astype(r.dtype)
    x = x * lax.rsqrt((x * x).mean(-1, keepdims=True) + eps)
    if kind == "gemma":
        return (x * (1 + weight.astype(x.dtype))).astype(r.dtype)
    return weight * x.astype(r.dtype)


def gradients(function, inputs, given):
    """{name: gradient} of a function of named arrays that returns a tuple."""
    inputs = {name: p for name, p in inputs.items() if p is not None}
    outputs, pull = jax.vjp(lambda inputs: function(**inputs), inputs)
    return pull(tuple(jnp.asarray(g, o.dtype) for g, o in zip(given, outputs, strict=True)))[0]


def turned(array):
    """The same rows in the opposite order; parameters as they are."""
    return jnp.flip(array, (0, 1, 2)) if array is not None and array.shape[:3] == LEAD else array


def check_gradients(ours, plain, inputs, given):
    """The numerics promise for every gradient: against float64, at most twice the plain expression's error.

    Of sums over rows the plain error is that of the worse of two orders of the rows: one order alone may be lucky.
    """
    got, eager = gradients(ours, inputs, given), gradients(plain, inputs, given)
    other = gradients(plain, {n: turned(p) for n, p in inputs.items()}, [turned(g) for g in given])
    with jax.enable_x64(True):
        wide = {n: None if p is None else jnp.asarray(np.asarray(p, np.float64)) for n, p in inputs.items()}
        exact = gradients(plain, wide, [np.asarray(g, np.float64) for g in given])
    assert got.keys() == exact.keys()
    for name, g in got.items():
        assert g.dtype == inputs[name].dtype and g.shape == inputs[name].shape
        found, right, *plains = (to_torch(tree[name]) for tree in (got, exact, eager, other))
        if inputs[name].shape[:3] == LEAD:
            plains = plains[:1]
        worse = max(plains, key=lambda value: float((value.double() - right.double()).abs().max()))
        assert_promise(f"d_{name}", found, right, worse)


def ffi_calls(jaxpr):
    """{target: its attributes} of every native call in a jaxpr, however deep."""
    found = {}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "ffi_call":
            found[eqn.params["target_name"]] = dict(eqn.params["attributes"]) | {"in": len(eqn.invars)}
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "jaxpr")):
            if hasattr(inner := getattr(value, "jaxpr", value), "eqns"):
                found |= ffi_calls(inner)
    return found
