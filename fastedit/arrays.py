"""The same kernels on NumPy and CuPy arrays, and on anything that speaks DLPack (JAX on the CPU): no torch.

Rows are fp32, fp16 or bf16 (the `ml_dtypes` type); edit parameters fp32; results are new arrays of the kind the
rows were: NumPy for the host, CuPy for a GPU. Formulas and arguments are those of `fastedit.ops`. Inside JAX's jit,
grad and vmap: `fastedit.jax`.

    import numpy as np
    from fastedit import arrays
    edited = arrays.edit(hidden, scale=scale, bias=bias)

The native module takes arrays as they are. What it does not take as it is (another byte order, rows that are not evenly
spaced, a DLPack exporter) is copied or viewed first (`_plain`), and then it is taken or refused with the reason.
"""

import math

import numpy as np

from .arguments import NORM_KINDS, check_norm_kind, check_on, check_steps, groups_of

try:
    from . import _native
except ImportError as error:
    raise ImportError(
        f"fastedit.arrays needs the native kernels, which this install lacks ({error}); see `fastedit doctor`"
    ) from error


def edit(hidden, scale=None, bias=None, read=None, offset=None, write=None, *, slot=None, strength=None,
         gate=None, rule=None, return_projection=False):  # fmt: skip
    """h' = h + k · ((scale − 1) ⊙ h + bias + (h @ readᵀ + offset) @ write), as `fastedit.ops.edit`.

    hidden (…, width); scale, bias (width,); read, write (rank, width); offset (rank,); slot int32 and strength
    fp32 one a row, strength also a float; gate (width,) with rule (3,) = (threshold, sharpness or 0, 1 for the cosine
    else 0), behind the slot dimension where there is one. Returns h', or (h', z (…, rank)).
    """
    done = _native.try_edit(hidden, scale, bias, read, offset, write, slot, strength, return_projection, gate, rule)
    if done is None:
        rows, *form = _plain(hidden=hidden, scale=scale, bias=bias, read=read, offset=offset, write=write, slot=slot)
        k, gate, rule = _plain_strength(strength, rows), *_plain(gate=gate, rule=rule)
        done = _native.edit(rows, *form, k, return_projection, gate, rule)
    return done if return_projection else done[0]


def edit_add(x, residual, scale=None, bias=None, read=None, offset=None, write=None, *, on="x", slot=None,
             strength=None, gate=None, rule=None, return_projection=False):  # fmt: skip
    """residual + E(x) (on="x") or E(residual + x) (on="sum"), as `fastedit.ops.edit_add`. One dtype for both."""
    check_on(on)
    rows, residual, *form = _plain(
        x=x, residual=residual, scale=scale, bias=bias, read=read, offset=offset, write=write, slot=slot
    )
    gate, rule = _plain(gate=gate, rule=rule)
    _same(rows, residual)
    done = _native.edit_add(
        rows, residual, *form, _plain_strength(strength, rows), on == "sum", return_projection, gate, rule
    )
    return done if return_projection else done[0]


def edit_add_norm(x, residual, weight=None, scale=None, bias=None, read=None, offset=None, write=None, *,
                  norm_bias=None, kind="rms", eps=1e-6, on="x", slot=None, strength=None, gate=None,
                  rule=None):  # fmt: skip
    """(residual', normed): edit_add, then an RMS, "gemma" or "layer" norm, as `fastedit.ops.edit_add_norm`."""
    check_on(on)
    check_norm_kind(weight, norm_bias, kind)
    rows, residual, weight, norm_bias, *form = _plain(
        x=x, residual=residual, weight=weight, norm_bias=norm_bias, scale=scale, bias=bias, read=read, offset=offset,
        write=write, slot=slot,
    )  # fmt: skip
    gate, rule = _plain(gate=gate, rule=rule)
    _same(rows, residual)
    return _native.edit_add_norm(
        rows, residual, weight, norm_bias, *form, _plain_strength(strength, rows), on == "sum", NORM_KINDS[kind],
        float(eps), False, True, False, gate, rule,
    )[:2]  # fmt: skip


def project(hidden, read, offset=None):
    """z = hidden @ readᵀ + offset, (…, rank) fp32, as `fastedit.ops.project`."""
    done = _native.try_project(hidden, read, offset)
    return _native.project(*_plain(hidden=hidden, read=read, offset=offset)) if done is None else done


def moments(hidden, group=None, groups=None):
    """(count (groups,) int64, mean, m2 (groups, width) float64) of each group's rows, as `fastedit.ops.moments`.

    group int32, one a row; a number outside 0 to groups − 1 leaves the row out. groups: None for the largest + 1.
    """
    hidden, group = _plain(hidden=hidden, group=group)
    library, order = _library(hidden), None
    if group is None:
        count, groups = library.full(1, math.prod(hidden.shape[:-1]), np.int64), 1
    else:
        groups = groups or groups_of(int(group.max(initial=0)))
        if library is not np:
            order = _sorted(library, group.reshape(-1), groups)
    first, mean, m2 = _native.moments(hidden, group, groups, order)
    if group is not None:
        count = library.diff(library.asarray(first, np.int64) if order is None else order[1].astype(np.int64))
    return count, *(pair.astype(np.float64).sum(0) for pair in (mean, m2))  # high and low parts


def value_ascent(hidden, weight, bias, head, *, steps, step_size, weight2=None, bias2=None, gram=None):
    """h + u after u ← u + a ∇V(h + u), `steps` times, as `fastedit.ops.value_ascent`; on the host alone.

    V(h) = head · relu(weight h + bias), or with a second hidden layer (weight2 (units2, units), bias2). gram: weight
    weightᵀ, to be kept for further calls; made here where it is None.
    """
    check_steps(steps, step_size)
    if gram is None and weight is not None:
        wide = np.asarray(weight, np.float64)
        gram = (wide @ wide.T).astype(np.float32)
    given = _plain(hidden=hidden, weight=weight, bias=bias, weight2=weight2, bias2=bias2, head=head, gram=gram)
    return _native.value_ascent(*given, steps, step_size)


def edit_backward(grad, hidden, scale=None, bias=None):
    """(d_hidden, d_scale, d_bias) of `edit` under scale and bias at the gradient `grad` of h'.

    d_scale and d_bias are fp32, None where the parameter is.
    """
    grad, hidden, scale, bias = _plain(grad=grad, hidden=hidden, scale=scale, bias=bias)
    _same(hidden, grad, "grad")
    needs = (True, scale is not None, bias is not None, *[False] * 4)
    return _native.edit_backward(grad, hidden, None, scale, bias, *[None] * 7, needs, None)[:3]


def _plain(**given):
    """NumPy or CuPy arrays over the same memory where a kernel can read it, else contiguous copies; None stays None."""
    return [None if value is None else _usable(_as_array(value, name)) for name, value in given.items()]


def _usable(array):
    if isinstance(array, np.ndarray):
        array = np.asarray(array)  # a subclass's arithmetic is not the kernel's
        size = array.itemsize
        if not array.dtype.isnative or not array.flags.aligned or any(step % size for step in array.strides):
            array = array.astype(array.dtype.newbyteorder("="), order="C")
        if array.flags.c_contiguous:
            return array
        evenly = array.ndim == 2 and array.strides[1] == size and array.strides[0] >= 0
        return array if evenly and array.shape[0] > 1 else np.ascontiguousarray(array)
    return _library(array).ascontiguousarray(array)


def _plain_strength(strength, rows):
    if strength is None or isinstance(strength, (int, float)):
        return strength if _library(rows) is np or strength is None else _library(rows).full(1, strength, np.float32)
    return _usable(_library(rows).asarray(strength, np.float32))


def _same(rows, other, name="residual"):
    if other is None or rows.shape != other.shape or rows.dtype != other.dtype:
        found = "None" if other is None else f"{other.dtype.name} {other.shape}"
        raise ValueError(f"{name} is {found}, expected {rows.dtype.name} {rows.shape} as the rows")


def _sorted(library, group, groups):
    """(order, first, block_first) of kernels/abi.h's SlotOrder, for a GPU."""
    group = library.where((group < 0) | (group >= groups), -1, group)
    first = library.searchsorted(library.sort(group), library.arange(groups + 1)).astype(np.int32)
    blocks = library.concatenate([library.zeros(1, np.int64), -(-library.diff(first) // 256)]).cumsum()  # kBlockRows
    return tuple(a.astype(np.int32) for a in (library.argsort(group, kind="stable"), first, blocks))


def _as_array(value, name):
    """A NumPy or CuPy array over the same memory; other DLPack exporters on the host come in as NumPy."""
    if isinstance(value, np.ndarray) or hasattr(value, "__cuda_array_interface__"):
        return value
    try:
        if hasattr(value, "__dlpack__"):
            try:
                return np.from_dlpack(value)
            except (TypeError, BufferError, RuntimeError):  # NumPy's DLPack knows no bfloat16
                pass
        array = np.asarray(value)
    except Exception as error:
        raise TypeError(f"{name} is {type(value).__name__}, expected a NumPy, CuPy or DLPack array ({error})") from error
    if array.dtype == object:
        raise TypeError(f"{name} is {type(value).__name__}, expected a NumPy, CuPy or DLPack array")
    return array


def _library(array):
    """The module that an array belongs to."""
    if isinstance(array, np.ndarray):
        return np
    if not _native.CUDA_ARCHITECTURES:
        raise RuntimeError("a GPU array needs the CUDA kernels, which this build lacks; see `fastedit doctor`")
    import cupy

    return cupy
