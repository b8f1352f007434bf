"""The native kernels as JAX calls: one function per op, over rows (…, width), without derivatives.

Arguments have been checked. Each function lists its buffers in the order in which csrc/xla.cpp reads them, absent ones
as None. Under vmap, a call whose results and batched arguments are all rows runs once over the whole batch. Any other
call runs once per element.
"""

import math
import struct

import jax
import jax.numpy as jnp
import numpy as np

from ... import _native
from .checks import ROW_DTYPES, Form

BLOCK_ROWS = 256  # kBlockRows of kernels/abi.h
_FORM = "5P2q2Pq2P"
_PACKED = {  # the structs of kernels/abi.h, for struct.pack
    "edit_backward": f"2q{_FORM}2iPqPqPq12P",
    "edit_add_norm_backward": f"2q{_FORM}2iPqPqPPqPq5P2i13P",
    "project_backward": "3qiPPq4P",
}

for _platform, _op, _handler in _native.xla_handlers():
    jax.ffi.register_ffi_target(f"fastedit_{_op}", _handler, platform=_platform)


class Out:
    """A result. `tail` is its shape, without the rows if `per_row`."""

    def __init__(self, wanted, tail, dtype=jnp.float32, per_row=True):
        self.wanted, self.tail, self.dtype, self.per_row = wanted, tail, dtype, per_row

    def shape(self, rows):
        return jax.ShapeDtypeStruct((rows, *self.tail) if self.per_row else self.tail, self.dtype)


def per_row(*arrays):
    return [(array, True) for array in arrays]


def shared(*arrays):
    return [(array, False) for array in arrays]


def _call(op, rows, inputs, outputs, workspace, attributes):
    """Results in the order of `outputs`, None if not wanted. `inputs`: one (array or None, per_row) each."""
    given = [(array, in_rows) for array, in_rows in inputs if array is not None]
    wanted = [out for out in outputs if out.wanted]
    arrays = [array.reshape(rows, -1) if in_rows else array for array, in_rows in given]
    masks = {"given": [array is not None for array, _ in inputs], "wanted": [out.wanted for out in outputs]}

    def run(rows, *arrays):
        shapes, flags = [out.shape(rows) for out in wanted], dict(masks)
        size = _native.workspace(op, struct.pack(_PACKED[op], rows, *workspace)) if workspace else 0
        if size:  # XLA places it among its temporaries: nothing is allocated while the call runs
            shapes.append(jax.ShapeDtypeStruct((size,), jnp.uint8))
            flags["wanted"] = [*flags["wanted"], True]
        bits = {name: np.int64(sum(1 << i for i, flag in enumerate(all_) if flag)) for name, all_ in flags.items()}
        call = jax.ffi.ffi_call(f"fastedit_{op}", shapes, vmap_method="sequential")
        return call(*arrays, rows=np.int64(rows), **bits, **attributes)[: len(wanted)]

    one = jax.custom_batching.custom_vmap(lambda *arrays: run(rows, *arrays))

    @one.def_vmap
    def batch(size, batched, *arrays):
        every = [True] * len(wanted)
        foldable = (
            size and all(out.per_row for out in wanted)
            and all(in_rows or not b for (_, in_rows), b in zip(given, batched, strict=True))
        )  # fmt: skip
        if not foldable:
            axes = [0 if b else None for b in batched]
            return jax.vmap(lambda *arrays: run(rows, *arrays), axes)(*arrays), every
        folded = []
        for array, (_, in_rows), b in zip(arrays, given, batched, strict=True):
            if in_rows:
                array = array if b else jnp.broadcast_to(array, (size, *array.shape))
                array = array.reshape(size * rows, -1)
            folded.append(array)
        results = _call(op, size * rows, _again(inputs, folded), outputs, workspace, attributes)
        return [r.reshape(size, rows, *r.shape[1:]) for r in results if r is not None], every

    results = iter(one(*arrays))
    return [next(results) if out.wanted else None for out in outputs]


def _again(inputs, arrays):
    """`inputs` with the arrays that are present replaced in turn."""
    arrays = iter(arrays)
    return [(array if array is None else next(arrays), in_rows) for array, in_rows in inputs]


def _size(shape):
    return math.prod(shape[:-1]), shape[-1]


def _rank(form):
    return 0 if form.read is None else form.read.shape[-2]


def _slots(form):
    if form.slot is None:
        return 1
    return next(p for p in (form.scale, form.bias, form.read) if p is not None).shape[0]


def _integers(**values):
    return {name: np.int64(value) for name, value in values.items()}


def _form(form):
    """(buffers, attributes) of a form."""
    one = form.strength is None or form.strength.shape == (1,)
    buffers = [
        *shared(form.scale, form.bias, form.read, form.offset, form.write), *per_row(form.slot),
        (form.strength, not one),
    ]  # fmt: skip
    return buffers, _integers(rank=_rank(form), slots=_slots(form), shared_strength=one)


def _code(dtype):
    return ROW_DTYPES[jnp.dtype(dtype).name]


def _shaped(array, lead):
    return None if array is None else array.reshape(*lead, array.shape[-1])


def edit(hidden, form, want_z):
    """(h', z or None)."""
    rows, width = _size(hidden.shape)
    buffers, attributes = _form(form)
    out, z = _call(
        "edit", rows, [*per_row(hidden), *buffers],
        [Out(True, (width,), hidden.dtype), Out(want_z, (_rank(form),))], None,
        attributes | _integers(width=width, dtype=_code(hidden.dtype)),
    )  # fmt: skip
    return out.reshape(hidden.shape), _shaped(z, hidden.shape[:-1])


def _add(x, residual, form, on_sum, want_out, want_z):
    width = x.shape[-1]
    buffers, attributes = _form(form)
    outputs = [Out(want_out, (width,), residual.dtype), Out(want_z, (_rank(form),))]
    dtypes = _integers(width=width, dtype=_code(x.dtype), residual_dtype=_code(residual.dtype), on_sum=on_sum)
    return [*per_row(x, residual), *buffers], outputs, attributes | dtypes


def edit_add(x, residual, form, on_sum, want_z):
    """(residual', z or None)."""
    inputs, outputs, attributes = _add(x, residual, form, on_sum, True, want_z)
    out, z = _call("edit_add", _size(x.shape)[0], inputs, outputs, None, attributes)
    return out.reshape(x.shape), _shaped(z, x.shape[:-1])


def edit_add_norm(x, residual, weight, norm_bias, form, on_sum, kind, eps, want_out, want_z, want_stats):
    """(residual' or None, normed, z or None, mean or None, rstd or None)."""
    inputs, outputs, attributes = _add(x, residual, form, on_sum, want_out, want_z)
    outputs += [
        Out(True, x.shape[-1:], residual.dtype), Out(want_stats and kind == 2, ()), Out(want_stats, ()),
    ]  # fmt: skip
    out, z, normed, mean, rstd = _call(
        "edit_add_norm", _size(x.shape)[0], [*inputs, *shared(weight, norm_bias)], outputs, None,
        attributes | _integers(kind=kind) | {"eps": np.float32(eps)},
    )  # fmt: skip
    lead = x.shape[:-1]
    return _shaped(out, lead), normed.reshape(x.shape), _shaped(z, lead), mean, rstd


def project(hidden, read, offset):
    """z."""
    rows, width = _size(hidden.shape)
    rank = read.shape[0]
    (z,) = _call(
        "project", rows, [*per_row(hidden), *shared(read, offset)], [Out(True, (rank,))], None,
        _integers(width=width, rank=rank, slots=1, dtype=_code(hidden.dtype)),
    )  # fmt: skip
    return z.reshape(*hidden.shape[:-1], rank)


def slot_order(slot, slots):
    """Rows sorted by slot, for kernels/abi.h's SlotOrder: as fastedit.kernels.reference.slot_order, in jnp."""
    slot = slot.reshape(-1)
    slot = jnp.where((slot < 0) | (slot >= slots), -1, slot)
    order = jnp.argsort(slot, stable=True).astype(jnp.int32)
    first = jnp.searchsorted(slot[order], jnp.arange(slots + 1, dtype=slot.dtype)).astype(jnp.int32)
    blocks = (jnp.diff(first) + BLOCK_ROWS - 1) // BLOCK_ROWS
    block_first = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(blocks).astype(jnp.int32)])
    return order, first, block_first


def _order(form, wanted):
    sums = any((wanted.scale, wanted.bias, wanted.read, wanted.offset, wanted.write))
    if form.slot is None or not sums:
        return None, None, None
    return slot_order(form.slot, _slots(form))


def _form_gradients(form, wanted):
    """Results for a form's gradients. The strength's gradient is always one number per row."""
    return [
        *(Out(w, () if p is None else p.shape, per_row=False) for w, p in zip(wanted[:5], form[:5], strict=True)),
        Out(wanted.strength, ()),
    ]  # fmt: skip


def _finish_form(gradients, form):
    d_strength = gradients[5]
    if d_strength is not None:
        d_strength = d_strength.sum() if form.strength.shape == (1,) else d_strength
        d_strength = d_strength.reshape(form.strength.shape)
    return Form(*gradients[:5], None, d_strength)


# For the size of a workspace the kernels look at which pointers there are, not where they point.


def _there(*arrays):
    return [int(array is not None) for array in arrays]


def _there_form(form, attributes):
    one = attributes["shared_strength"]
    return [
        *_there(*form[:5]), int(attributes["rank"]), int(attributes["slots"]), *_there(form.slot, form.strength),
        int(not one), 0, 0,
    ]  # fmt: skip


def _there_outs(outputs):
    return [int(out.wanted) for out in outputs]


def edit_backward(grad, hidden, residual, form, grad_z, z, want_rows, wanted, shape, dtype):
    """(d_hidden or None in `dtype`, Form of gradients or None). `wanted`: a Form of flags."""
    rows, width = _size(shape)
    buffers, attributes = _form(form)
    order = _order(form, wanted)
    outputs = [Out(want_rows, (width,), dtype), *_form_gradients(form, wanted)]
    codes = (_code(dtype if grad is None else grad.dtype), _code(dtype))
    streams = [v for array in (grad, hidden, residual) for v in (*_there(array), width)]
    d_hidden, *gradients = _call(
        "edit_backward", rows,
        [*per_row(grad, hidden, residual), *buffers, *per_row(grad_z, z), *shared(*order)], outputs,
        [width, *_there_form(form, attributes), *codes, *streams, *_there(grad_z, z), *_there_outs(outputs),
         *_there(*order)],
        attributes | _integers(width=width, dtype=codes[1], residual_dtype=codes[0]),
    )  # fmt: skip
    return None if d_hidden is None else d_hidden.reshape(shape), _finish_form(gradients, form)


def edit_add_norm_backward(
    grad_residual, grad_normed, residual_out, x, residual, weight, mean, rstd, form, grad_z, z, on_sum, kind,
    want_x, want_residual, wanted, want_weight, want_norm_bias, x_dtype,
):  # fmt: skip
    """(d_x, d_residual, Form of gradients, d_weight, d_norm_bias), each None if not wanted. The last two are fp32."""
    rows, width = _size(residual_out.shape)
    dtype = residual_out.dtype
    one_gradient = on_sum and (want_x or want_residual)  # of the sum: x's and the residual's alike
    buffers, attributes = _form(form)
    order = _order(form, wanted)
    outputs = [
        Out(want_x or one_gradient, (width,), x_dtype), Out(want_residual and not one_gradient, (width,), dtype),
        *_form_gradients(form, wanted), Out(want_weight, (width,), per_row=False),
        Out(want_norm_bias, (width,), per_row=False),
    ]  # fmt: skip
    codes = (_code(x_dtype), _code(dtype))
    pairs = [v for array in (grad_residual, grad_normed) for v in (*_there(array), width)]
    inner = [v for array in (x, residual) for v in (*_there(array), width)]
    d_x, d_residual, *gradients, d_weight, d_norm_bias = _call(
        "edit_add_norm_backward", rows,
        [*per_row(grad_residual, grad_normed, residual_out, x, residual), *buffers, *shared(weight),
         *per_row(mean, rstd, grad_z, z), *shared(*order)], outputs,
        [width, *_there_form(form, attributes), *codes, *pairs, *_there(residual_out), *inner,
         *_there(weight, mean, rstd, grad_z, z), int(on_sum), kind, *_there_outs(outputs), *_there(*order)],
        attributes | _integers(
            width=width, dtype=codes[0], residual_dtype=codes[1], on_sum=on_sum, kind=kind,
        ),
    )  # fmt: skip
    d_residual = d_x if one_gradient else d_residual
    d_x, d_residual = (
        None if not want else d.reshape(residual_out.shape)
        for want, d in ((want_x, d_x), (want_residual, d_residual))
    )
    return d_x, d_residual, _finish_form(gradients, form), d_weight, d_norm_bias


def project_backward(grad_z, hidden, read, want_hidden, want_read, want_offset, shape, dtype):
    """(d_hidden, d_read, d_offset), each None where not wanted."""
    rows, width = _size(shape)
    rank = grad_z.shape[-1]
    outputs = [
        Out(want_hidden, (width,), dtype), Out(want_read, (rank, width), per_row=False),
        Out(want_offset, (rank,), per_row=False),
    ]  # fmt: skip
    d_hidden, d_read, d_offset = _call(
        "project_backward", rows, [*per_row(grad_z, hidden), *shared(read)], outputs,
        [width, rank, _code(dtype), 1, *_there(hidden), width, *_there(read), *_there_outs(outputs)],
        _integers(width=width, rank=rank, slots=1, dtype=_code(dtype)),
    )  # fmt: skip
    return None if d_hidden is None else d_hidden.reshape(shape), d_read, d_offset
