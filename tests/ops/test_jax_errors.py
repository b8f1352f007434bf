"""The JAX face on empty and on wrong input, refusals of the handlers behind it, and what importing it brings along."""

import subprocess
import sys

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="needs JAX: pip install jax")

import jax.numpy as jnp  # noqa: E402
from jax_support import same_bits  # noqa: E402

from fastedit import jax as fej  # noqa: E402


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8)])
def test_nothing_in_nothing_out(shape):
    h, form = jnp.zeros(shape), {name: jnp.ones(shape[-1]) for name in ("scale", "bias")}
    low_rank = {"read": jnp.ones((2, shape[-1])), "offset": jnp.ones(2), "write": jnp.ones((2, shape[-1]))}
    for call in (
        lambda form: fej.edit(h, **form),
        lambda form: fej.edit_add(h, h, **form, on="sum"),
        lambda form: fej.edit_add_norm(h, h, jnp.ones(shape[-1]), **form)[1],
    ):
        assert call(form | low_rank).shape == shape
        for name, d in jax.jit(jax.grad(lambda form: call(form).sum()))(form | low_rank).items():
            assert d.shape == (form | low_rank)[name].shape and not np.any(d)
    z = fej.project(h, low_rank["read"], low_rank["offset"])
    np.testing.assert_array_equal(z, np.ones((*shape[:-1], 2)))
    same_bits(fej.edit(h, **form, **low_rank, return_projection=True)[1], z)


H, ONE = jax.ShapeDtypeStruct((2, 8), jnp.float32), np.ones(8, np.float32)
SLOT = np.array([0, 0], np.int32)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda h: fej.edit(h, ONE[:7]), ValueError, r"scale is float32 \(7,\), expected float32 \(8,\)"),
        (lambda h: fej.edit(h, jnp.ones(8, jnp.bfloat16)), TypeError, r"bfloat16 \(8,\), .*astype\('float32'\)"),
        (lambda h: fej.edit(h.astype(int), ONE), TypeError, "hidden has dtype int32, expected one of float32"),
        (lambda h: fej.edit(h[0, 0], ONE), ValueError, "hidden is a single number"),
        (lambda h: fej.edit(object(), ONE), TypeError, "hidden is object, expected a JAX or NumPy array"),
        (lambda h: fej.edit(h, read=ONE[None]), ValueError, "belong together"),
        (lambda h: fej.edit(h, read=np.ones((65, 8)), write=np.ones((65, 8))), ValueError, "rank 1 to 64"),
        (lambda h: fej.edit(h, ONE, slot=SLOT), ValueError, r"scale is float32 \(8,\), expected float32 \(8, 8\)"),
        (lambda h: fej.edit(h, slot=SLOT), ValueError, "need a leading slot dimension"),
        (lambda h: fej.edit(h, ONE[None], slot=SLOT[:1]), ValueError, r"slot is int32 \(1,\), expected int32 \(2,\)"),
        (lambda h: fej.edit(h, ONE[None], slot=ONE[:2]), TypeError, r"slot is float32 \(2,\), expected int32"),
        (lambda h: fej.edit(h, ONE, strength=ONE[:3]), ValueError, r"strength is float32 \(3,\), expected"),
        (lambda h: fej.edit(h, ONE, return_projection=True), ValueError, "needs `read`"),
        (lambda h: fej.edit_add(h, h[:1], ONE), ValueError, r"residual has shape \(1, 8\) and x \(2, 8\)"),
        (lambda h: fej.edit_add(h.astype(jnp.float16), h, ONE), TypeError, "expected one dtype, or bfloat16 x on"),
        (lambda h: fej.edit_add(h.astype(jnp.bfloat16), h, ONE, on="sum"), TypeError, "under on='sum', expected one"),
        (lambda h: fej.edit_add(h, h, ONE, on="y"), ValueError, "on is 'y', expected 'x'"),
        (lambda h: fej.edit_add_norm(h, h, None), ValueError, "needs the norm's weight"),
        (lambda h: fej.edit_add_norm(h, h, ONE, norm_bias=ONE), ValueError, "norm_bias belongs to kind='layer'"),
        (lambda h: fej.edit_add_norm(h, h, ONE, kind="l2"), ValueError, "kind is 'l2', expected one of 'rms'"),
        (lambda h: fej.edit_add_norm(h, h, ONE.astype(np.float16)), TypeError, r"weight is float16 \(8,\), expected"),
        (lambda h: fej.project(h, ONE), ValueError, r"read has shape \(8,\), expected \(rank, width\)"),
        (lambda h: fej.project(h, ONE[None, :4]), ValueError, r"read is float32 \(1, 4\), expected float32 \(1, 8\)"),
    ],
)
def test_bad_input_fails_while_tracing(call, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(call, H)


SIZES = {"rows": 2, "width": 8, "rank": 0, "slots": 1, "shared_strength": 1, "dtype": 0, "given": 0b11, "wanted": 0b1}


@pytest.mark.parametrize(
    "change, scale, message",
    [
        ({}, np.ones(7, np.float32), "scale has 7 elements, expected 8"),
        ({}, np.ones(8, np.int32), "scale is int32, expected float32"),
        ({}, np.ones(8, np.int8), "scale is another dtype, expected float32"),
        ({"rows": 3}, ONE, "hidden has 16 elements, expected 24"),
        ({"rows": -1}, ONE, "a size is negative"),
        ({"rank": 65}, ONE, "rank is 65, the kernels take 0 to 64"),
        ({"dtype": 1}, ONE, "hidden is float32, expected bfloat16"),
        ({"dtype": 7}, ONE, "dtype is not float32, bfloat16 or float16"),
        ({"given": 0b111}, ONE, "bias is missing"),
        ({"given": 0b1}, ONE, "the call has 2 buffers, expected 1"),
        ({"width": None}, ONE, "attribute width is missing"),
    ],
)
def test_the_handler_refuses_what_does_not_fit(change, scale, message):
    """Behind the checks: a call that jax.ffi could make by itself gets an error and never reaches a kernel."""
    attributes = {name: np.int64(value) for name, value in (SIZES | change).items() if value is not None}
    call = jax.ffi.ffi_call("fastedit_edit", jax.ShapeDtypeStruct((2, 8), jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        call(np.ones((2, 8), np.float32), scale, **attributes).block_until_ready()


# --- imports --------------------------------------------------------------------------------------------------


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def test_no_torch_is_imported():
    done = python(
        "import sys, jax, jax.numpy as jnp, fastedit.jax as fej;"
        "h = jnp.ones((2, 4)); assert (jax.grad(lambda b: fej.edit(h, bias=b).sum())(jnp.ones(4)) == 2).all();"
        "assert 'torch' not in sys.modules, 'torch came along'"
    )
    assert done.returncode == 0, done.stderr


def test_without_jax_the_error_says_what_to_install():
    done = python("import sys; sys.modules['jax'] = None; import fastedit.jax")
    assert "ImportError: fastedit.jax needs JAX" in done.stderr and "pip install 'jax>=0.8'" in done.stderr


def test_a_star_import_leaves_the_users_jax_alone():
    import fastedit

    assert fastedit.jax is fej and "jax" not in fastedit.__all__
