"""The JAX face under jit, scan, checkpoint and vmap, and lowered for CUDA."""

import os
import subprocess
import sys

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="needs JAX: pip install jax")

import jax.numpy as jnp  # noqa: E402
from jax import lax  # noqa: E402
from jax_support import WIDTH, ffi_calls, make_form, rows, same_bits  # noqa: E402

from fastedit import jax as fej  # noqa: E402


@pytest.fixture
def random():
    return np.random.default_rng(0)


def test_one_trace_a_shape(random):
    traces = []

    @jax.jit
    def step(h, bias):
        traces.append(h.shape)
        return jax.grad(lambda b: fej.edit(h, bias=b).sum())(bias)

    for lead in ((4,), (4,), (6,), (4,)):
        np.testing.assert_array_equal(step(rows(random, lead, jnp.float32), jnp.ones(WIDTH)), np.full(WIDTH, lead[0]))
    assert traces == [(4, WIDTH), (6, WIDTH)]


@pytest.mark.parametrize("rank", [0, 3])
def test_grad_under_jit_and_scan_and_checkpoint(random, rank):
    """Layers in a scan, recomputed: the gradient is that of the plain loop, bit for bit."""
    layers = 3
    h, weight = rows(random, (2, 40), jnp.bfloat16), jnp.ones(WIDTH, jnp.bfloat16)
    form = make_form(random, rank, slots=layers)

    def layer(stream, form):
        x = (stream * 0.5).astype(stream.dtype)
        stream, normed = fej.edit_add_norm(x, stream, weight, **form)
        return normed, None

    def scanned(form):
        return lax.scan(jax.checkpoint(layer), h, form)[0].astype(jnp.float32).sum()

    def looped(form):
        stream = h
        for i in range(layers):
            stream, _ = layer(stream, jax.tree.map(lambda p: p[i], form))
        return stream.astype(jnp.float32).sum()

    for got, want in zip(*(jax.tree.leaves(jax.jit(jax.grad(f))(form)) for f in (scanned, looped)), strict=True):
        same_bits(got, want)


def stack(function, *columns):
    return jax.tree.map(lambda *r: jnp.stack(r), *(function(*one) for one in zip(*columns, strict=True)))


def test_vmap_over_rows_is_one_call(random):
    h, residual, form = rows(random, (4, 3, 5), jnp.float32), rows(random, (3, 5), jnp.float32), make_form(random, 2)
    weight = jnp.ones(WIDTH)
    k = jnp.asarray(random.random((4, 3, 5), np.float32))

    def call(h, k):
        return fej.edit_add_norm(h, residual, weight, **form, strength=k, return_projection=True)

    jax.tree.map(same_bits, jax.vmap(call)(h, k), stack(call, h, k))
    traced = jax.make_jaxpr(jax.vmap(call))(h, k)
    assert "scan" not in str(traced) and ffi_calls(traced.jaxpr)["fastedit_edit_add_norm"]["rows"] == 4 * 15
    pull = lambda h, k: jax.grad(lambda h: call(h, k)[1].sum())(h)  # noqa: E731
    same_bits(jax.vmap(pull)(h, k), stack(pull, h, k))
    assert "scan" not in str(jax.make_jaxpr(jax.vmap(pull))(h, k))
    twice = jax.vmap(jax.vmap(lambda h, k: fej.edit(h, **form, strength=k)))(h, k)
    same_bits(twice, fej.edit(h, **form, strength=k))
    inner = jax.vmap(lambda h: fej.edit(h, **form), in_axes=1, out_axes=1)(h)
    same_bits(inner, fej.edit(h, **form))


@pytest.mark.parametrize("rank", [0, 2])
def test_vmap_over_parameters_and_their_gradients(random, rank):
    h, forms = rows(random, (4, 3, 5), jnp.float32), make_form(random, rank, slots=4)

    def call(h, form):
        return fej.edit(h, **form)

    def pull(h, form):
        return jax.grad(lambda form: (call(h, form) ** 2).sum())(form)

    each = [{name: None if p is None else p[i] for name, p in forms.items()} for i in range(4)]
    same_bits(jax.vmap(call)(h, forms), stack(call, h, each))
    jax.tree.map(same_bits, jax.vmap(pull)(h, forms), stack(pull, h, each))
    one = each[0]
    shared = jax.vmap(pull, in_axes=(0, None))(h, one)  # one edit, a gradient for each element of the batch
    jax.tree.map(same_bits, shared, stack(pull, h, [one] * 4))
    total = jax.grad(lambda form: (jax.vmap(call, (0, None))(h, form) ** 2).sum())(one)
    for got, want in zip(jax.tree.leaves(total), jax.tree.leaves(shared), strict=True):
        np.testing.assert_allclose(got, want.sum(0), rtol=1e-5, atol=1e-5 * float(abs(want).max()))


def test_vmap_over_nothing_and_over_slots(random):
    h, form = rows(random, (4, 6), jnp.float32), make_form(random, slots=3)
    slot = random.integers(-1, 3, (4, 6)).astype(np.int32)
    call = lambda h, slot: fej.edit(h, **form, slot=slot)  # noqa: E731
    same_bits(jax.vmap(call)(h, slot), call(h, slot))
    assert jax.vmap(call)(h[:0], slot[:0]).shape == (0, 6, WIDTH)


def test_lowering_for_cuda_needs_no_gpu(random):
    """The same calls under platform CUDA: what XLA is told, checked where there is no GPU."""
    h, form = rows(random, (4,), jnp.float32), make_form(random, 2)
    loss = jax.jit(jax.grad(lambda form: (fej.edit_add(h, h, **form) ** 2).sum()))
    text = loss.trace(form).lower(lowering_platforms=("cuda",)).as_text()
    assert "@fastedit_edit_add(" in text and "@fastedit_edit_backward(" in text


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, PartitionSpec as P
from fastedit import jax as fej

h, edit = jax.random.normal(jax.random.key(0), (600, 40)), (jnp.full(40, 1.5), jnp.ones(40))
call = lambda h, edit: fej.edit_add(h, h, *edit)
mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
split = jax.shard_map(call, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"), check_vma=False)
np.testing.assert_array_equal(jax.jit(split)(h, edit), call(h, edit))
slope = lambda f: jax.jit(jax.grad(lambda edit: (f(h, edit) ** 2).sum()))(edit)
for got, want in zip(slope(split), slope(call), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5)
"""


def test_shard_map_over_two_devices():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
