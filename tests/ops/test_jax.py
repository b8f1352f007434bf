"""The JAX face: bit for bit the kernels of fastedit.arrays, gradients within the numerics promise, slots."""

import numpy as np
import pytest
import torch
from oracle import FORM

jax = pytest.importorskip("jax", reason="needs JAX: pip install jax")

import jax.numpy as jnp  # noqa: E402
from fastedit.kernels.reference.slot_order import slot_order  # noqa: E402
from jax import lax  # noqa: E402
from jax_support import (  # noqa: E402
    DTYPES,
    LEAD,
    WIDTH,
    check_gradients,
    ffi_calls,
    gradients,
    make_form,
    plain_edit,
    plain_norm,
    rows,
    same_bits,
    strengths,
    to_torch,
)  # fmt: skip

from fastedit import arrays, ops  # noqa: E402
from fastedit import jax as fej  # noqa: E402
from fastedit.ops.jax import native  # noqa: E402

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)


@pytest.fixture
def random():
    return np.random.default_rng(0)


# --- forward --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("rank", [0, 3])
@dtypes
def test_equals_the_arrays_face(random, dtype, rank, jit):
    compiled = (lambda f, **o: jax.jit(f, **o)) if jit else (lambda f, **o: f)
    lead = (2, 30)
    h, residual, form = rows(random, lead, dtype), rows(random, lead, dtype), make_form(random, rank)
    numbers = {name: None if p is None else np.asarray(p) for name, p in form.items()}
    a, b, k = np.asarray(h), np.asarray(residual), strengths(random, lead)
    same_bits(compiled(fej.edit)(h, **form), arrays.edit(a, **numbers))
    same_bits(compiled(fej.edit)(h, **form, strength=0.5), arrays.edit(a, **numbers, strength=0.5))
    same_bits(compiled(fej.edit)(h, **form, strength=k), arrays.edit(a, **numbers, strength=np.asarray(k)))
    for on in ("x", "sum"):
        add = compiled(fej.edit_add, static_argnames="on")
        same_bits(add(h, residual, **form, on=on), arrays.edit_add(a, b, **numbers, on=on))
    weight = rows(random, (), dtype)
    for kind in ("rms", "gemma", "layer"):
        shift = weight if kind == "layer" else None
        norm = compiled(fej.edit_add_norm, static_argnames=("kind", "on", "eps"))
        got = norm(h, residual, weight, **form, norm_bias=shift, kind=kind, eps=1e-5, on="sum")
        shift = None if shift is None else np.asarray(shift)
        want = arrays.edit_add_norm(
            a, b, np.asarray(weight), **numbers, norm_bias=shift, kind=kind, eps=1e-5, on="sum"
        )
        same_bits(got[0], want[0])
        same_bits(got[1], want[1])
    if rank:
        z = arrays.project(a, numbers["read"], numbers["offset"])
        same_bits(compiled(fej.project)(h, form["read"], form["offset"]), z)
        edited = compiled(fej.edit, static_argnames="return_projection")(h, **form, return_projection=True)
        same_bits(edited[1], z)


def test_bfloat16_onto_a_float32_residual(random):
    x, residual, form = rows(random, (9,), jnp.bfloat16), rows(random, (9,), jnp.float32), make_form(random)
    out = fej.edit_add(x, residual, **form)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, residual + plain_edit(x, form)[0], rtol=1e-5, atol=1e-5)
    grads = jax.grad(lambda x, r: (fej.edit_add(x, r, **form) * residual).sum(), argnums=(0, 1))(x, residual)
    assert grads[0].dtype == jnp.bfloat16
    same_bits(grads[0], (residual * form["scale"]).astype(jnp.bfloat16))
    same_bits(grads[1], residual)


def test_residual_and_projection_on_request(random):
    x, residual, form = rows(random, (9,), jnp.float32), rows(random, (9,), jnp.float32), make_form(random, 2)
    weight = jnp.ones(WIDTH)
    out, normed, z = fej.edit_add_norm(x, residual, weight, **form, return_projection=True)
    none, again = fej.edit_add_norm(x, residual, weight, **form, return_residual=False)
    assert none is None
    same_bits(again, normed)
    same_bits(z, fej.project(x, form["read"], form["offset"]))
    added, z_added = fej.edit_add(x, residual, **form, return_projection=True)
    same_bits(added, out)
    same_bits(z_added, z)
    loss = lambda bias: fej.edit_add_norm(x, residual, weight, bias=bias, return_residual=False)[1].sum()  # noqa: E731
    whole = lambda bias: fej.edit_add_norm(x, residual, weight, bias=bias)[1].sum()  # noqa: E731
    same_bits(jax.grad(loss)(form["bias"]), jax.grad(whole)(form["bias"]))


def test_identity_and_untouched_rows_keep_their_bits(random):
    h = np.array(rows(random, (6,), jnp.float32))
    h.view(np.int32)[0, :3] = -1  # a NaN with a payload
    one, zero = jnp.ones(WIDTH), jnp.zeros(WIDTH)
    same_bits(fej.edit(h[1:], one, zero), h[1:])
    same_bits(fej.edit(h, one * 2, zero, strength=0.0), h)
    same_bits(fej.edit(h, one[None] * 2, slot=np.full(6, -1, np.int32)), h)


def test_denormals_survive(random):
    """XLA flushes them in its threads; the kernels, and the threads they start, must not: fp16's small rows vanish."""
    small = (rows(random, (4096,), jnp.float32) * 1e-5).astype(jnp.float16)
    tiny = np.full((4096, WIDTH), 1e-40, np.float32)
    one, zero = np.ones(WIDTH, np.float32), np.zeros(WIDTH, np.float32)
    for h in (np.asarray(small), tiny):
        np.testing.assert_array_equal(jax.jit(fej.edit)(h, one, zero), h)
        np.testing.assert_array_equal(arrays.edit(h, one, zero), h)  # on the threads that the call before started


# --- gradients ------------------------------------------------------------------------------------------------


def norm_inputs(random, kind, dtype):
    inputs = {"x": rows(random, LEAD, dtype), "residual": rows(random, LEAD, dtype)}
    if kind is not None:
        inputs["weight"] = (1 + 0.2 * rows(random, (), jnp.float32)).astype(dtype)
    if kind == "layer":
        inputs["norm_bias"] = rows(random, (), dtype)
    return inputs


@pytest.mark.parametrize("on", ["x", "sum"])
@pytest.mark.parametrize("kind", [None, "rms", "gemma", "layer"])
@pytest.mark.parametrize("rank", [0, 3])
@dtypes
def test_gradients_equal_the_torch_face(random, dtype, rank, kind, on):
    """The same kernels behind both: edit, then edit_add (kind None) or edit_add_norm, bit for bit."""
    inputs = norm_inputs(random, kind, dtype) | make_form(random, rank) | {"strength": strengths(random, LEAD)}
    names = [name for name, p in inputs.items() if p is not None]
    given = [rows(random, LEAD, dtype) for _ in range(1 if kind is None else 2)]

    def call(face, x, residual, **rest):
        form = {name: rest.get(name) for name in (*FORM, "strength")}
        x = face.edit(x, **form)
        if kind is None:
            return (face.edit_add(x, residual, **form, on=on),)
        norm = {name: rest.get(name) for name in ("weight", "norm_bias")}
        return face.edit_add_norm(x, residual, **norm, **form, kind=kind, eps=1e-5, on=on)

    got = jax.jit(lambda inputs: gradients(lambda **inputs: call(fej, **inputs), inputs, given))(inputs)
    leaves = {name: to_torch(inputs[name]).requires_grad_() for name in names}
    want = torch.autograd.grad(call(ops, **leaves), list(leaves.values()), [to_torch(g) for g in given])
    for name, d in zip(names, want, strict=True):
        assert torch.equal(to_torch(got[name]), d), name


@pytest.mark.parametrize("rank", [0, 17])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "bfloat16"])
def test_edit_gradients(random, dtype, rank):
    """h', and z where there is one, each with a gradient."""
    given = [rows(random, LEAD, dtype)] + ([rows(random, LEAD, jnp.float32, rank)] if rank else [])

    def ours(hidden, strength, **form):
        out = fej.edit(hidden, **form, strength=strength, return_projection=rank > 0)
        return out if rank else (out,)

    def plain(hidden, strength, **form):
        out, z = plain_edit(hidden, dict.fromkeys(FORM) | form, strength)
        return (out.astype(hidden.dtype), z)[: 1 + (rank > 0)]

    inputs = {"hidden": rows(random, LEAD, dtype), "strength": strengths(random, LEAD), **make_form(random, rank)}
    check_gradients(ours, plain, inputs, given)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_gradient_of_a_dial(random, shape):
    """One strength for all rows: the sum of the rows' own gradients, which are held to the promise above."""
    h, form = rows(random, (9,), jnp.float32), make_form(random, 2)
    pull = jax.grad(lambda k: (fej.edit(h, **form, strength=k) ** 2).sum())
    dial = pull(jnp.full(shape, 0.7, jnp.float32))
    assert dial.shape == shape
    same_bits(dial.reshape(()), pull(jnp.full((9,), 0.7, jnp.float32)).sum())


@pytest.mark.parametrize("kind, on", [(None, "x"), (None, "sum"), ("rms", "x"), ("gemma", "sum"), ("layer", "x")])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "bfloat16"])
def test_edit_add_norm_gradients(random, dtype, kind, on):
    """edit_add (kind None) and edit_add_norm; the norm's gradients are taken at the residual as stored."""
    inputs = norm_inputs(random, kind, dtype) | make_form(random, 17)
    given = [rows(random, LEAD, dtype) for _ in range(1 if kind is None else 2)]

    def ours(x, residual, **rest):
        if kind is None:
            return (fej.edit_add(x, residual, **rest, on=on),)
        return fej.edit_add_norm(x, residual, **rest, kind=kind, eps=1e-5, on=on)

    stored = np.asarray(ours(**inputs)[0])

    def plain(x, residual, weight=None, norm_bias=None, **form):
        form = dict.fromkeys(FORM) | form
        r = plain_edit(residual + x, form)[0] if on == "sum" else residual + plain_edit(x, form)[0]
        r = r.astype(x.dtype)
        if kind is None:
            return (r,)
        at_stored = r + lax.stop_gradient(stored.astype(r.dtype) - r)
        return r, plain_norm(at_stored, weight, norm_bias, kind, 1e-5)

    check_gradients(ours, plain, inputs, given)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "bfloat16"])
def test_project_gradients(random, dtype):
    form = make_form(random, 17)
    inputs = {"hidden": rows(random, LEAD, dtype), "read": form["read"], "offset": form["offset"]}
    check_gradients(
        lambda **inputs: (fej.project(**inputs),),
        lambda hidden, read, offset: (hidden.astype(read.dtype) @ read.T + offset,),
        inputs, [rows(random, LEAD, jnp.float32, 17)],
    )  # fmt: skip


def test_only_what_is_wanted_is_computed(random):
    """Masks count arguments and results from the lowest bit, in the order of csrc/xla.cpp."""
    h, form = rows(random, (6,), jnp.float32), make_form(random, 2)

    def asked(op, results, function, argument):
        call = ffi_calls(jax.make_jaxpr(function)(argument).jaxpr)[f"fastedit_{op}"]
        return int(call["given"]), int(call["wanted"]) & (1 << results) - 1  # the next bit is the workspace

    bias_alone = jax.grad(lambda bias: (fej.edit(h, form["scale"], bias) ** 2).sum())
    assert asked("edit", 2, bias_alone, form["bias"])[1] == 0b01
    assert asked("edit_backward", 7, bias_alone, form["bias"]) == (0b11001, 0b100)  # grad, scale, bias: no hidden
    rows_alone = jax.grad(lambda h: fej.edit(h, form["scale"], form["bias"]).sum())
    assert asked("edit_backward", 7, rows_alone, h)[1] == 0b1
    probe = jax.grad(lambda h: fej.project(h, form["read"]).sum())
    assert asked("project_backward", 3, probe, h) == (0b101, 0b1)  # grad_z, read: no hidden
    weight = jnp.ones(WIDTH)
    frozen = jax.grad(lambda x: fej.edit_add_norm(x, h, weight, form["scale"])[1].sum())
    assert asked("edit_add_norm_backward", 10, frozen, h)[1] == 0b1  # d_x: no norm weight, no residual
    no_gradient = lambda x: fej.edit_add_norm(x, h, weight)[1]  # noqa: E731
    assert asked("edit_add_norm", 5, no_gradient, h)[1] == 0b101  # residual' and normed: no statistics


def test_unused_results_have_no_gradient(random):
    """Only z, only residual' or only normed: the others' gradients are absent, not arrays of zeros."""
    x, residual, form = rows(random, (300,), jnp.float32), rows(random, (300,), jnp.float32), make_form(random, 3)
    weight = jnp.ones(WIDTH)
    by_z = jax.grad(lambda x: fej.edit(x, **form, return_projection=True)[1].sum())(x)
    np.testing.assert_allclose(by_z, jnp.broadcast_to(form["read"].sum(0), x.shape), rtol=1e-5, atol=1e-6)
    by_residual = jax.grad(lambda bias: fej.edit_add_norm(x, residual, weight, bias=bias)[0].sum())(form["bias"])
    np.testing.assert_array_equal(by_residual, np.full(WIDTH, 300.0))
    by_weight = jax.grad(lambda w: fej.edit_add_norm(x, residual, w)[0].sum())(weight)
    np.testing.assert_array_equal(by_weight, np.zeros(WIDTH))


# --- slots ----------------------------------------------------------------------------------------------------


def test_slot_order_is_the_reference_one(random):
    order = jax.jit(native.slot_order, static_argnums=1)
    for count, slots in ((1, 1), (2000, 5)):
        slot = random.integers(-1, slots + 1, count).astype(np.int32)  # one number out of range, as a GPU may meet
        for got, want in zip(order(slot, slots), slot_order(torch.from_numpy(slot), slots), strict=True):
            same_bits(got, want.numpy())


@pytest.mark.parametrize("rank", [0, 3])
@dtypes
def test_slots(random, dtype, rank):
    """Forward as the arrays face, gradients as the torch face: the same kernels over rows in the same order."""
    lead, slots = (3, 300), 5
    h, residual, form = rows(random, lead, dtype), rows(random, lead, dtype), make_form(random, rank, slots)
    slot = random.integers(-1, slots - 1, lead).astype(np.int32)  # the last slot has no rows
    numbers = {name: None if p is None else np.asarray(p) for name, p in form.items()}
    same_bits(fej.edit(h, **form, slot=slot), arrays.edit(np.asarray(h), **numbers, slot=slot))
    weight = jnp.ones(WIDTH, dtype)
    inputs = {"x": h, **form}
    given = [residual, h]

    @jax.jit
    def pull(inputs, slot):
        rest = {"residual": residual, "weight": weight, "slot": slot}
        return gradients(lambda **inputs: fej.edit_add_norm(**inputs, **rest), inputs, given)

    got = pull(inputs, slot)
    leaves = {name: to_torch(p).requires_grad_() for name, p in inputs.items() if p is not None}
    outputs = ops.edit_add_norm(
        residual=to_torch(residual), weight=to_torch(weight), slot=torch.from_numpy(slot), **leaves
    )
    want = torch.autograd.grad(outputs, list(leaves.values()), list(map(to_torch, given)))
    for name, d in zip(leaves, want, strict=True):
        assert torch.equal(to_torch(got[name]), d), name
        assert name == "x" or not d[slots - 1].any()


def test_slot_out_of_range_raises_when_it_runs(random):
    h, form = rows(random, (4,), jnp.float32), make_form(random, slots=2)
    run = jax.jit(lambda h, slot: fej.edit(h, **form, slot=slot))
    same_bits(run(h, np.array([-1, -1, -1, -1], np.int32)), h)
    # Which of the two depends on how JAX dispatched the call.
    message = r"slot of row 2 is 2, expected -1 \(untouched\) or 0 to 1"
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match=message):
        run(h, np.array([0, 1, 2, 0], np.int32)).block_until_ready()


def test_rows_of_no_width_project_onto_their_slots_offset():
    table, offset = jnp.zeros((2, 1, 0)), jnp.array([[3.0], [4.0]])
    slot = jnp.array([0, 1, -1], jnp.int32)
    _, z = fej.edit(jnp.zeros((3, 0)), read=table, offset=offset, write=table, slot=slot, return_projection=True)
    assert z.tolist() == [[3.0], [4.0], [0.0]]


def test_the_residual_alone_has_the_sums_gradient():
    x, scale = jnp.ones((4, 8)), jnp.full(8, 2.0)
    d_residual = jax.jit(jax.grad(lambda r: (3 * fej.edit_add(x, r, scale=scale)).sum()))(jnp.ones((4, 8)))
    assert (d_residual == 3).all()
