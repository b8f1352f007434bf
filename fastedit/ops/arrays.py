"""The same kernels on NumPy and CuPy arrays, and on anything that speaks DLPack (JAX on the CPU): no torch.

Rows are fp32, fp16 or bf16 (the `ml_dtypes` type). Edit parameters are fp32. Results are new arrays of the rows' kind:
NumPy on the host, CuPy on a GPU. Formulas and arguments are those of `fastedit.ops`. Inside JAX's jit, grad and vmap
use `fastedit.jax`.

    import numpy as np
    from fastedit import arrays
    edited = arrays.edit(hidden, scale=scale, bias=bias)

The native module takes arrays as they are. Three kinds are copied or viewed first (`_plain`): another byte order, rows
that are not evenly spaced, a DLPack exporter. The result is then taken, or refused with the reason.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from ..arguments import NORM_KINDS, check_norm_kind, check_on, check_steps, groups_of

try:
    from .. import _native
except ImportError as error:
    raise ImportError(
        f"fastedit.arrays needs the native kernels, which this install lacks ({error}); see `fastedit doctor`"
    ) from error

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
Array: TypeAlias = "np.ndarray | Any"  # CuPy's where the rows are


def edit(
    hidden: ArrayLike, scale: ArrayLike | None = None, bias: ArrayLike | None = None, read: ArrayLike | None = None,
    offset: ArrayLike | None = None, write: ArrayLike | None = None, *, slot: ArrayLike | None = None,
    strength: ArrayLike | None = None, gate: ArrayLike | None = None, rule: ArrayLike | None = None,
    return_projection: bool = False,
) -> Array:  # fmt: skip
    """h' = h + k · ((scale − 1) ⊙ h + bias + (h @ readᵀ + offset) @ write), as `fastedit.ops.edit`.

    hidden (…, width); scale, bias (width,); read, write (rank, width); offset (rank,). slot int32 and strength fp32,
    one per row; strength may also be a float. gate (width,) with rule (3,) = (threshold, sharpness or 0, 1 for the
    cosine else 0), each with a leading slot dimension if there are slots. Returns h', or with return_projection
    (h', z (…, rank)). Raises TypeError, ValueError for a wrong dtype or shape, IndexError for a slot out of range on the
    host, before anything runs.
    """
    done = _native.try_edit(hidden, scale, bias, read, offset, write, slot, strength, return_projection, gate, rule)
    if done is not None:
        return done
    rows, *form = _plain(hidden=hidden, scale=scale, bias=bias, read=read, offset=offset, write=write, slot=slot)
    done = _native.edit(rows, *form, _plain_strength(strength, rows), return_projection, *_plain(gate=gate, rule=rule))
    return done if return_projection else done[0]


def edit_add(
    x: ArrayLike, residual: ArrayLike, scale: ArrayLike | None = None, bias: ArrayLike | None = None,
    read: ArrayLike | None = None, offset: ArrayLike | None = None, write: ArrayLike | None = None, *,
    on: Literal["x", "sum"] = "x", slot: ArrayLike | None = None, strength: ArrayLike | None = None,
    gate: ArrayLike | None = None, rule: ArrayLike | None = None, return_projection: bool = False,
) -> Array:  # fmt: skip
    """residual + E(x) (on="x") or E(residual + x) (on="sum"), as `fastedit.ops.edit_add`.

    x, residual (…, width), of one dtype. scale, bias, read, offset, write, slot, strength, gate, rule: as `edit`.
    Returns residual' as x is, or with return_projection (residual', z (…, rank)). Raises TypeError, ValueError for a wrong
    dtype or shape, before anything runs.
    """
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


def edit_add_norm(
    x: ArrayLike, residual: ArrayLike, weight: ArrayLike | None = None, scale: ArrayLike | None = None,
    bias: ArrayLike | None = None, read: ArrayLike | None = None, offset: ArrayLike | None = None,
    write: ArrayLike | None = None, *, norm_bias: ArrayLike | None = None,
    kind: Literal["rms", "gemma", "layer"] = "rms", eps: float = 1e-6, on: Literal["x", "sum"] = "x",
    slot: ArrayLike | None = None, strength: ArrayLike | None = None, gate: ArrayLike | None = None,
    rule: ArrayLike | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """(residual', normed): edit_add, then a norm of residual', as `fastedit.ops.edit_add_norm`.

    x, residual (…, width), of one dtype; weight (width,) in it. kind: "rms", "gemma" (times 1 + weight) or "layer", which
    alone may have norm_bias (width,) and may lack weight. eps: added to the variance. on, scale, bias, read, offset,
    write, slot, strength, gate, rule: as `edit_add`. Raises TypeError, ValueError for a wrong dtype, shape or kind.
    """
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


def project(hidden: ArrayLike, read: ArrayLike, offset: ArrayLike | None = None) -> Array:
    """z = hidden @ readᵀ + offset, (…, rank) fp32, as `fastedit.ops.project`.

    hidden (…, width), fp32, fp16 or bf16; read (rank, width) fp32, rank 1 to 64; offset (rank,) fp32 or None. Raises
    TypeError, ValueError for a wrong dtype or shape.
    """
    done = _native.try_project(hidden, read, offset)
    return _native.project(*_plain(hidden=hidden, read=read, offset=offset)) if done is None else done


def moments(
    hidden: ArrayLike, group: ArrayLike | None = None, groups: int | None = None
) -> tuple[Array, Array, Array]:
    """(count (groups,) int64, mean, m2 (groups, width) float64) of each group's rows, as `fastedit.ops.moments`.

    hidden (…, width), fp32, fp16 or bf16.
    group int32, one per row. A number outside 0 to groups − 1 leaves the row out. groups: None for the largest number +
    1.
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


def value_ascent(
    hidden: ArrayLike, weight: ArrayLike, bias: ArrayLike, head: ArrayLike, *, steps: int, step_size: float,
    weight2: ArrayLike | None = None, bias2: ArrayLike | None = None, gram: ArrayLike | None = None,
) -> Array:  # fmt: skip
    """h + u after u ← u + a ∇V(h + u), `steps` times, as `fastedit.ops.value_ascent`. On the host only.

    hidden (…, width); weight (units, width), bias (units,), head (units,) or (units2,), fp32. steps, step_size: n and a.
    V(h) = head · relu(weight h + bias), or with a second hidden layer (weight2 (units2, units), bias2). gram: weight
    weightᵀ, to be kept for further calls. It is computed here if None.
    """
    check_steps(steps, step_size)
    if gram is None and weight is not None:
        wide = np.asarray(weight, np.float64)
        gram = (wide @ wide.T).astype(np.float32)
    given = _plain(hidden=hidden, weight=weight, bias=bias, weight2=weight2, bias2=bias2, head=head, gram=gram)
    return _native.value_ascent(*given, steps, step_size)


def edit_backward(
    grad: ArrayLike, hidden: ArrayLike, scale: ArrayLike | None = None, bias: ArrayLike | None = None
) -> tuple[Array, Array | None, Array | None]:
    """(d_hidden, d_scale, d_bias) of `edit` with scale and bias, for the gradient `grad` of h'.

    grad, hidden (…, width), of one dtype; scale, bias (width,) fp32. d_scale and d_bias are fp32, or None where the
    parameter is None.
    """
    grad, hidden, scale, bias = _plain(grad=grad, hidden=hidden, scale=scale, bias=bias)
    _same(hidden, grad, "grad")
    needs = (True, scale is not None, bias is not None, *[False] * 4)
    return _native.edit_backward(grad, hidden, None, scale, bias, *[None] * 7, needs, None)[:3]


def _plain(**given):
    """NumPy or CuPy arrays over the same memory if a kernel can read it, else contiguous copies. None stays None."""
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
    """A NumPy or CuPy array over the same memory. Other DLPack exporters on the host become NumPy."""
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
