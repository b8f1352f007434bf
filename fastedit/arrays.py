"""The same kernels on NumPy and CuPy arrays, and on anything that speaks DLPack (JAX on the CPU): no torch.

Rows are fp32, fp16 or bf16 (the `ml_dtypes` type); edit parameters fp32; results are new arrays of the kind the
rows were: NumPy for the host, CuPy for a GPU. Formulas and arguments are those of `fastedit.ops`. Inside JAX's jit,
grad and vmap: `fastedit.jax`.

    import numpy as np
    from fastedit import arrays
    edited = arrays.edit(hidden, scale=scale, bias=bias)
"""

import math

import numpy as np

from .arguments import NORM_KINDS, check_norm_kind, check_on, check_projection, check_steps

try:
    from . import _native
except ImportError as error:
    raise ImportError(
        f"fastedit.arrays needs the native kernels, which this install lacks ({error}); see `fastedit doctor`"
    ) from error

_CODES = {"float32": 0, "bfloat16": 1, "float16": 2}
_FP32 = np.dtype(np.float32)
_BLOCK_ROWS = 256  # kBlockRows of kernels/abi.h


def edit(hidden, scale=None, bias=None, read=None, offset=None, write=None, *, slot=None, strength=None,
         gate=None, rule=None, return_projection=False):  # fmt: skip
    """h' = h + k · ((scale − 1) ⊙ h + bias + (h @ readᵀ + offset) @ write), as `fastedit.ops.edit`.

    hidden (…, width); scale, bias (width,); read, write (rank, width); offset (rank,); slot int32 and strength
    fp32 one a row, strength also a float; gate (width,) with rule (3,) = (threshold, sharpness or 0, 1 for the cosine
    else 0), behind the slot dimension where there is one. Returns h', or (h', z (…, rank)).
    """
    call = _Call(hidden, "hidden")
    form = call.form(scale, bias, read, offset, write, slot, strength)
    out, z = call.empty_rows(), call.empty_projection(read, return_projection)
    gated = call.gate(gate, rule, form)
    call("edit", *call.extent, *form, call.code, call.pointer, call.stride, _pointer(out), _pointer(z), *gated)
    return (out, z) if return_projection else out


def edit_add(x, residual, scale=None, bias=None, read=None, offset=None, write=None, *, on="x", slot=None,
             strength=None, gate=None, rule=None, return_projection=False):  # fmt: skip
    """residual + E(x) (on="x") or E(residual + x) (on="sum"), as `fastedit.ops.edit_add`. One dtype for both."""
    call = _Call(x, "x")
    form = call.form(scale, bias, read, offset, write, slot, strength)
    out, z = call.empty_rows(), call.empty_projection(read, return_projection)
    call("edit_add", *call.add(residual, form, on, out, z), *call.gate(gate, rule, form))
    return (out, z) if return_projection else out


def edit_add_norm(x, residual, weight=None, scale=None, bias=None, read=None, offset=None, write=None, *,
                  norm_bias=None, kind="rms", eps=1e-6, on="x", slot=None, strength=None, gate=None,
                  rule=None):  # fmt: skip
    """(residual', normed): edit_add, then an RMS, "gemma" or "layer" norm, as `fastedit.ops.edit_add_norm`."""
    check_norm_kind(weight, norm_bias, kind)
    call = _Call(x, "x")
    form = call.form(scale, bias, read, offset, write, slot, strength)
    weight, norm_bias = (
        call.parameter(name, p, (call.width,), call.dtype) for name, p in (("weight", weight), ("norm_bias", norm_bias))
    )
    out, normed = call.empty_rows(), call.empty_rows()
    call(
        "edit_add_norm", *call.add(residual, form, on, out, None), NORM_KINDS[kind], float(eps), weight, norm_bias,
        _pointer(normed), 0, 0, *call.gate(gate, rule, form),
    )  # fmt: skip
    return out, normed


def project(hidden, read, offset=None):
    """z = hidden @ readᵀ + offset, (…, rank) fp32, as `fastedit.ops.project`."""
    call = _Call(hidden, "hidden")
    rank = call.rank_of(read)
    reads, offsets = call.parameter("read", read, (rank, call.width)), call.parameter("offset", offset, (rank,))
    z = call.empty_projection(read, True)
    call("project", *call.extent, rank, call.code, call.pointer, call.stride, reads, offsets, _pointer(z))
    return z


def moments(hidden, group=None, groups=None):
    """(count (groups,) int64, mean, m2 (groups, width) float64) of each group's rows, as `fastedit.ops.moments`.

    group int32, one a row; a number outside 0 to groups − 1 leaves the row out. groups: None for the largest + 1.
    """
    call = _Call(hidden, "hidden")
    library, order, count = call.library, (0, 0, 0), np.full(1, call.extent[0], np.int64)
    if group is not None:
        call.parameter("group", group, call.shape[:-1], np.dtype(np.int32))
        group = library.asarray(group).reshape(-1)
        groups = groups or max(int(group.max(initial=0)) + 1, 1)
        group = library.where((group < 0) | (group >= groups), -1, group)
        first = library.searchsorted(library.sort(group), library.arange(groups + 1)).astype(np.int32)
        count = library.diff(first).astype(np.int64)
        blocks = library.concatenate([library.zeros(1, np.int64), -(-count // _BLOCK_ROWS)]).cumsum()
        sorted_rows = library.argsort(group, kind="stable")
        order = (call.keep(a.astype(np.int32)) for a in (sorted_rows, first, blocks))
    mean, m2 = (library.empty((2, groups or 1, call.width), np.float32) for _ in range(2))
    args = (*call.extent, len(count), call.code, call.pointer, call.stride, *order, _pointer(mean), _pointer(m2))
    call.backward("moments", args)
    return library.asarray(count), *(pair.astype(np.float64).sum(0) for pair in (mean, m2))


def value_ascent(hidden, weight, bias, head, *, steps, step_size, weight2=None, bias2=None, gram=None):
    """h + u after u ← u + a ∇V(h + u), `steps` times, as `fastedit.ops.value_ascent`; on the host alone.

    V(h) = head · relu(weight h + bias), or with a second hidden layer (weight2 (units2, units), bias2). gram: weight
    weightᵀ, to be kept for further calls; made here where it is None.
    """
    check_steps(steps, step_size)
    call = _Call(hidden, "hidden")
    if call.backend != "cpu":
        raise ValueError("arrays.value_ascent takes arrays on the host; fastedit.ops.value_ascent serves a GPU")
    units, units2 = len(weight), 0 if weight2 is None else len(weight2)
    if gram is None:
        wide = np.asarray(weight, np.float64)
        gram = (wide @ wide.T).astype(np.float32)
    shapes = ((units, call.width), (units,), (units2, units), (units2,), (units2 or units,), (units, units))
    names = ("weight", "bias", "weight2", "bias2", "head", "gram")
    given = (weight, bias, weight2, bias2, head, gram)
    net = [call.parameter(*one) for one in zip(names, given, shapes, strict=True)]
    out = call.empty_rows()
    sizes = (*call.extent, units, units2, steps, step_size, call.code)
    call("value_ascent", *sizes, call.pointer, call.stride, *net, _pointer(out), 0, 0, 0)
    return out


def edit_backward(grad, hidden, scale=None, bias=None):
    """(d_hidden, d_scale, d_bias) of `edit` under scale and bias at the gradient `grad` of h'.

    d_scale and d_bias are fp32, None where the parameter is.
    """
    call = _Call(hidden, "hidden")
    form = call.form(scale, bias, None, None, None, None, None)
    grad, grad_stride = call.rows(grad, "grad")
    d_hidden = call.empty_rows()
    d_scale, d_bias = (None if p is None else call.library.empty(call.width, np.float32) for p in (scale, bias))
    args = (
        *call.extent, *form, call.code, call.code, grad, grad_stride, call.pointer, call.stride, 0, 0, 0, 0,
        _pointer(d_hidden), _pointer(d_scale), _pointer(d_bias), 0, 0, 0, 0, 0, 0, 0,
    )  # fmt: skip
    call.backward("edit_backward", args)
    return d_hidden, d_scale, d_bias


class _Call:
    """One call's rows, the array library they belong to, and what must outlive the kernel."""

    def __init__(self, rows, name):
        rows = _as_array(rows, name)
        self.library, self.backend = _library(rows)
        self.kept = []
        self.shape, self.dtype, self.width = rows.shape, rows.dtype, rows.shape[-1] if rows.ndim else 0
        if rows.ndim == 0:
            raise ValueError(f"{name} is a single number, expected hidden states of shape (…, width)")
        if self.dtype.name not in _CODES:
            raise TypeError(f"{name} has dtype {self.dtype.name}, expected one of {', '.join(_CODES)}")
        self.code = _CODES[self.dtype.name]
        self.extent = (math.prod(self.shape[:-1]), self.width)
        self.pointer, self.stride = self.rows(rows, name)

    def __call__(self, op, *args):
        getattr(_native, f"{self.backend}_{op}")(*args, self.stream())

    def backward(self, op, args):
        size = getattr(_native, f"{self.backend}_{op}_workspace")(*args)
        space = self.library.empty(size, np.uint8) if size else None
        self(op, *args, _pointer(space))

    def stream(self):
        return 0 if self.backend == "cpu" else self.library.cuda.get_current_stream().ptr

    def rows(self, array, name):
        """(pointer, row stride in elements) of a stream like the first: a view where its strides allow."""
        array = _as_array(array, name)
        if array.shape != self.shape or array.dtype != self.dtype:
            raise ValueError(
                f"{name} is {array.dtype.name} {array.shape}, expected {self.dtype.name} {self.shape} as the rows"
            )
        size = array.dtype.itemsize
        regular = array.ndim == 2 and array.strides[1] == size and array.strides[0] % size == 0 and array.strides[0] >= 0
        if not regular:
            array = self.library.ascontiguousarray(array)
        self.kept.append(array)
        return _pointer(array), array.strides[0] // size if array.ndim == 2 else self.width

    def parameter(self, name, array, shape, dtype=_FP32):
        """Pointer to a contiguous parameter of the given shape and dtype; 0 for None."""
        if array is None:
            return 0
        array = _as_array(array, name)
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(f"{name} is {array.dtype.name} {array.shape}, expected {dtype.name} {shape}")
        if _library(array)[1] != self.backend:
            raise ValueError(f"{name} is not on the same device as the rows")
        return self.keep(array)

    def keep(self, array):
        """Pointer to an array that lives as long as the call."""
        self.kept.append(self.library.ascontiguousarray(array))
        return _pointer(self.kept[-1])

    def rank_of(self, read):
        array = _as_array(read, "read")
        rank = array.shape[-2] if array.ndim >= 2 else 0
        if not 1 <= rank <= _native.MAX_RANK:
            raise ValueError(f"read has shape {array.shape}, expected (rank, width) with rank 1 to {_native.MAX_RANK}")
        return rank

    def form(self, scale, bias, read, offset, write, slot, strength):
        lead = self.shape[:-1]
        slots = ()
        if slot is not None:
            some = next((p for p in (scale, bias, read) if p is not None), None)
            slots = np.shape(some)[:1]
            if some is None or not slots or slots[0] == 0:
                raise ValueError("slot is given, so the parameters need a leading slot dimension, e.g. (slots, width)")
        if (read is None) != (write is None) or (offset is not None and read is None):
            raise ValueError("read, offset and write belong together: read and write are both needed (offset may be None)")
        rank = 0 if read is None else self.rank_of(read)
        stride = 0
        if strength is not None:
            strength = self.library.asarray(strength, np.float32)
            stride = int(strength.size != 1)
            strength = strength.reshape(lead) if stride and strength.shape == lead else strength.reshape(-1)
        return (
            self.parameter("scale", scale, (*slots, self.width)),
            self.parameter("bias", bias, (*slots, self.width)),
            self.parameter("read", read, (*slots, rank, self.width)),
            self.parameter("offset", offset, (*slots, rank)),
            self.parameter("write", write, (*slots, rank, self.width)),
            rank, slots[0] if slots else 1,
            self.parameter("slot", slot, lead, np.dtype(np.int32)),
            self.parameter("strength", strength, lead if stride else (1,)),
            stride,
        )  # fmt: skip

    def gate(self, gate, rule, form):
        """What a gated call has behind its other arguments: two pointers, or nothing without a gate."""
        if gate is None and rule is None:
            return ()
        if gate is None or rule is None:
            raise ValueError("gate and rule belong together: one is given without the other")
        *_, slots, slot, _, _ = form
        lead = (slots,) if slot else ()
        return self.parameter("gate", gate, (*lead, self.width)), self.parameter("rule", rule, (*lead, 3))

    def add(self, residual, form, on, out, z):
        check_on(on)
        pointer, stride = self.rows(residual, "residual")
        return (
            *self.extent, *form, self.code, self.code, self.pointer, self.stride, pointer, stride, _pointer(out),
            _pointer(z), int(on == "sum"),
        )  # fmt: skip

    def empty_rows(self):
        return self.library.empty(self.shape, self.dtype)

    def empty_projection(self, read, wanted):
        check_projection(wanted, read)
        if not wanted:
            return None
        return self.library.empty((*self.shape[:-1], self.rank_of(read)), np.float32)


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
    """(array module, native backend) of an array."""
    if isinstance(array, np.ndarray):
        return np, "cpu"
    if not _native.CUDA_ARCHITECTURES:
        raise RuntimeError("a GPU array needs the CUDA kernels, which this build lacks; see `fastedit doctor`")
    import cupy

    return cupy, "cuda"


def _pointer(array):
    if array is None:
        return 0
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr
