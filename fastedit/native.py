"""The native module's torch face: tensors to pointers, one function an op, for `cpu` and `cuda` alike.

Functions have the names and argument order of fastedit.kernels.reference; the tuples they pass follow the
structs of kernels/abi.h field by field. Streams are contiguous of any shape, or (rows, width) with a unit inner
stride, checked by ops.
"""

import functools
import math
import types

import torch

from .dispatch import BackendError
from .kernels.reference.slot_order import slot_order
from .kernels.reference.value_ascent import ascend

try:
    from . import _native
except ImportError as error:  # a pure-Python install
    _native, _missing = None, error

MAX_UNITS = 6144  # of a value net on a GPU: 16 bytes each in the 99 KB of a block on sm_86 and later
DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _ptr(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def _rows(tensor):
    """(pointer, row stride) of a stream."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))


def _extent(rows):
    """(rows, width, row stride): contiguous of any shape, or (rows, width) with rows apart."""
    width = rows.shape[-1]
    if rows.is_contiguous():
        return (rows.numel() // width if width else math.prod(rows.shape[:-1])), width, width
    return rows.shape[0], width, rows.stride(0)


def _output_like(rows):
    """Contiguous, in rows' shape and dtype. empty_like is much the cheapest allocation: no shape to parse."""
    if rows.is_contiguous():
        return torch.empty_like(rows)
    return torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)


def _z_like(rows, read, wanted):
    if not wanted or read is None:
        return None
    return torch.empty((*rows.shape[:-1], read.shape[-2]), dtype=torch.float32, device=rows.device)


def _form(scale, bias, read, offset, write, slot, coefficient):
    if read is None and slot is None and coefficient is None:  # RED and steering: most calls
        return (
            0 if scale is None else scale.data_ptr(), 0 if bias is None else bias.data_ptr(),
            0, 0, 0, 0, 1, 0, 0, 0,
        )  # fmt: skip
    slots = 1
    if slot is not None:
        slots = next((p.shape[0] for p in (scale, bias, read) if p is not None), 1)
    return (
        _ptr(scale), _ptr(bias), _ptr(read), _ptr(offset), _ptr(write), 0 if read is None else read.shape[-2], slots,
        _ptr(slot), _ptr(coefficient), 0 if coefficient is None or coefficient.numel() == 1 else 1,
    )  # fmt: skip


def _gate(gate, rule):
    """What a gated call has behind the struct's fields: nothing without a gate."""
    return () if gate is None else (gate.data_ptr(), rule.data_ptr())


_last_order = ()  # (what it was computed from, the slots themselves, order): a batch's layers all ask for the same


def _slot_order(slot, slots):
    """(tensors to keep alive, their pointers)."""
    global _last_order
    if slot is None:
        return None, (0, 0, 0)
    stream = torch.cuda.current_stream(slot.device) if slot.is_cuda else None
    if stream is not None and torch.cuda.is_current_stream_capturing():  # the graph's own memory, kept by the graph
        kept = slot_order(slot, slots)
        return kept, tuple(t.data_ptr() for t in kept)
    key = slot.data_ptr(), slot.numel(), slot.device, slots, stream, slot._version
    if not _last_order or _last_order[0] != key:
        _last_order = key, slot, slot_order(slot, slots)  # holding `slot`, its address cannot come to mean other slots
    kept = _last_order[2]
    return kept, tuple(t.data_ptr() for t in kept)


def _like(parameter, wanted):
    return torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device) if wanted else None


def _finish_coefficient(d_k, coefficient):
    if d_k is None:
        return None
    return d_k.sum().reshape(coefficient.shape) if coefficient.numel() == 1 else d_k.reshape(coefficient.shape)


def _parameter_grads(needs, scale, bias, read, offset, write, coefficient, rows, device):
    """Six fp32 outputs or None; the coefficient's is always one number a row."""
    grads = [_like(p, n) for p, n in zip((scale, bias, read, offset, write), needs[1:6], strict=True)]
    grads.append(torch.empty(rows, dtype=torch.float32, device=device) if needs[6] else None)
    return grads


def _on_its_device(op):
    """Launch on the first tensor's GPU, whichever is current."""

    @functools.wraps(op)
    def guarded(*args, **kwargs):
        index = next(a for a in args if isinstance(a, torch.Tensor)).device.index
        if index == torch.cuda.current_device():
            return op(*args, **kwargs)
        with torch.cuda.device(index):
            return op(*args, **kwargs)

    return guarded


def _make(name):
    stream_of = (lambda: 0) if name == "cpu" else (lambda: torch.cuda.current_stream().cuda_stream)
    call = {op: getattr(_native, f"{name}_{op}") for op in _native.OPS}
    guard = _on_its_device if name == "cuda" else lambda op: op

    def workspace(op, args, device):
        if name == "cpu":  # takes its own, as it knows the threads' blocks
            return None
        size = getattr(_native, f"{name}_{op}_workspace")(*args)
        return torch.empty(size, dtype=torch.uint8, device=device) if size else None

    def edit(hidden, scale, bias, read, offset, write, slot, coefficient, want_z=False, gate=None, rule=None):
        rows, width, stride = _extent(hidden)
        out = _output_like(hidden)
        z = _z_like(hidden, read, want_z)
        call["edit"](
            rows, width, *_form(scale, bias, read, offset, write, slot, coefficient), DTYPE[hidden.dtype],
            hidden.data_ptr(), stride, out.data_ptr(), 0 if z is None else z.data_ptr(), *_gate(gate, rule), stream_of(),
        )  # fmt: skip
        return out, z

    def _add_args(x, residual, form, on_sum, z, out):
        rows, width, stride = _extent(x)
        residual_stride = width if residual.is_contiguous() else residual.stride(0)
        return (
            rows, width, *_form(*form), DTYPE[x.dtype], DTYPE[residual.dtype], x.data_ptr(), stride,
            residual.data_ptr(), residual_stride, 0 if out is None else out.data_ptr(),
            0 if z is None else z.data_ptr(), on_sum,
        )  # fmt: skip

    def edit_add(
        x, residual, scale, bias, read, offset, write, slot, coefficient, on_sum=False, want_z=False, gate=None, rule=None
    ):
        out = _output_like(residual)
        z = _z_like(x, read, want_z)
        form = (scale, bias, read, offset, write, slot, coefficient)
        call["edit_add"](*_add_args(x, residual, form, on_sum, z, out), *_gate(gate, rule), stream_of())
        return out, z

    def edit_add_norm(
        x, residual, weight, norm_bias, scale, bias, read, offset, write, slot, coefficient,
        on_sum=False, kind=0, eps=1e-6, want_z=False, want_residual=True, want_stats=True, gate=None, rule=None,
    ):  # fmt: skip
        normed = _output_like(residual)
        out = torch.empty_like(normed) if want_residual else None
        z = _z_like(x, read, want_z)
        args = _add_args(x, residual, (scale, bias, read, offset, write, slot, coefficient), on_sum, z, out)
        mean = rstd = None
        if want_stats:
            rstd = torch.empty(args[0], dtype=torch.float32, device=x.device)
            mean = torch.empty_like(rstd) if kind == 2 else None
        call["edit_add_norm"](
            *args, kind, eps, _ptr(weight), _ptr(norm_bias), normed.data_ptr(), _ptr(mean), _ptr(rstd),
            *_gate(gate, rule), stream_of(),
        )  # fmt: skip
        return out, normed, z, mean, rstd

    direct_edit, direct_edit_add, direct_edit_add_norm = call["edit"], call["edit_add"], call["edit_add_norm"]
    direct_edit_backward, direct_norm_backward = call["edit_backward"], call["edit_add_norm_backward"]

    def plain_edit(hidden, scale, bias):
        """edit for contiguous rows under scale and bias alone: nothing but the call."""
        out = torch.empty_like(hidden)
        width = hidden.shape[-1]
        direct_edit(
            hidden.numel() // width, width, 0 if scale is None else scale.data_ptr(),
            0 if bias is None else bias.data_ptr(), 0, 0, 0, 0, 1, 0, 0, 0, DTYPE[hidden.dtype], hidden.data_ptr(),
            width, out.data_ptr(), 0, stream_of(),
        )  # fmt: skip
        return out

    def plain_edit_add(x, residual, scale, bias, on_sum):
        """edit_add for contiguous rows of one dtype under scale and bias alone: nothing but the call."""
        out = torch.empty_like(residual)
        width, code = x.shape[-1], DTYPE[x.dtype]
        direct_edit_add(
            x.numel() // width, width, 0 if scale is None else scale.data_ptr(),
            0 if bias is None else bias.data_ptr(), 0, 0, 0, 0, 1, 0, 0, 0, code, code, x.data_ptr(), width,
            residual.data_ptr(), width, out.data_ptr(), 0, on_sum, stream_of(),
        )  # fmt: skip
        return out

    def plain_edit_add_norm(x, residual, weight, norm_bias, scale, bias, on_sum, kind, eps, want_residual):
        """edit_add_norm likewise: (residual' or None, normed)."""
        normed = torch.empty_like(residual)
        out = torch.empty_like(residual) if want_residual else None
        width, code = x.shape[-1], DTYPE[x.dtype]
        direct_edit_add_norm(
            x.numel() // width, width, 0 if scale is None else scale.data_ptr(),
            0 if bias is None else bias.data_ptr(), 0, 0, 0, 0, 1, 0, 0, 0, code, code, x.data_ptr(), width,
            residual.data_ptr(), width, 0 if out is None else out.data_ptr(), 0, on_sum, kind, eps,
            0 if weight is None else weight.data_ptr(), 0 if norm_bias is None else norm_bias.data_ptr(),
            normed.data_ptr(), 0, 0, stream_of(),
        )  # fmt: skip
        return out, normed

    def project(hidden, read, offset):
        rows, width = hidden.shape
        z = torch.empty((rows, read.shape[0]), dtype=torch.float32, device=hidden.device)
        call["project"](
            rows, width, read.shape[0], DTYPE[hidden.dtype], hidden.data_ptr(), hidden.stride(0),
            read.data_ptr(), _ptr(offset), z.data_ptr(), stream_of(),
        )  # fmt: skip
        return z

    def edit_backward(
        grad, hidden, residual, scale, bias, read, offset, write, slot, coefficient, grad_z, z, needs, out_dtype
    ):
        some = next(t for t in (grad, hidden, grad_z) if t is not None)
        rows, device = some.shape[0], some.device
        width = next(t for t in (grad, hidden, read) if t is not None).shape[-1]
        d_hidden = torch.empty((rows, width), dtype=out_dtype, device=device) if needs[0] else None
        grads = _parameter_grads(needs, scale, bias, read, offset, write, coefficient, rows, device)
        form = _form(scale, bias, read, offset, write, slot, coefficient)
        _kept, order = _slot_order(slot if any(needs[1:6]) else None, form[6])
        args = (
            rows, width, *form, DTYPE[out_dtype if grad is None else grad.dtype], DTYPE[out_dtype], *_rows(grad),
            *_rows(hidden), *_rows(residual if hidden is not None else None), _ptr(grad_z), _ptr(z), _ptr(d_hidden),
            *map(_ptr, grads), *order,
        )  # fmt: skip
        space = workspace("edit_backward", args, device)
        call["edit_backward"](*args, _ptr(space), stream_of())
        grads[-1] = _finish_coefficient(grads[-1], coefficient)
        return d_hidden, *grads

    def plain_edit_backward(grad, hidden, scale, bias, needs, dtype):
        """(d_hidden, d_scale, d_bias) for contiguous rows of any shape under scale and bias alone."""
        width = grad.shape[-1]
        d_hidden = torch.empty_like(grad, dtype=dtype) if needs[0] else None
        d_scale = torch.empty_like(scale) if needs[1] else None
        d_bias = torch.empty_like(bias) if needs[2] else None
        args = (
            grad.numel() // width, width, 0 if scale is None else scale.data_ptr(), 0 if bias is None else bias.data_ptr(),
            0, 0, 0, 0, 1, 0, 0, 0, DTYPE[grad.dtype], DTYPE[dtype], grad.data_ptr(), width,
            0 if hidden is None else hidden.data_ptr(), width, 0, 0, 0, 0, 0 if d_hidden is None else d_hidden.data_ptr(),
            0 if d_scale is None else d_scale.data_ptr(), 0 if d_bias is None else d_bias.data_ptr(), 0, 0, 0, 0, 0, 0, 0,
        )  # fmt: skip
        space = workspace("edit_backward", args, grad.device)
        direct_edit_backward(*args, _ptr(space), stream_of())
        return d_hidden, d_scale, d_bias

    def edit_add_norm_backward(
        grad_residual, grad_normed, residual_out, x, residual, weight, mean, rstd,
        scale, bias, read, offset, write, slot, coefficient, grad_z, z, on_sum, kind, needs, needs_norm,
        x_dtype, residual_dtype,
    ):  # fmt: skip
        rows, width = residual_out.shape
        device = residual_out.device
        shared = on_sum and (needs[0] or needs[7])
        d_x = torch.empty((rows, width), dtype=x_dtype, device=device) if needs[0] or shared else None
        d_residual = None
        if needs[7] and not shared:
            d_residual = torch.empty((rows, width), dtype=residual_dtype, device=device)
        grads = _parameter_grads(needs, scale, bias, read, offset, write, coefficient, rows, device)
        d_weight, d_norm_bias = (
            torch.empty(width, dtype=torch.float32, device=device) if wanted else None for wanted in needs_norm
        )
        form = _form(scale, bias, read, offset, write, slot, coefficient)
        _kept, order = _slot_order(slot if any(needs[1:6]) else None, form[6])
        args = (
            rows, width, *form, DTYPE[x_dtype], DTYPE[residual_dtype], *_rows(grad_residual), *_rows(grad_normed),
            residual_out.data_ptr(), *_rows(x), *_rows(residual if on_sum and x is not None else None), _ptr(weight),
            _ptr(mean), _ptr(rstd), _ptr(grad_z), _ptr(z), int(on_sum), kind, _ptr(d_x), _ptr(d_residual),
            *map(_ptr, grads), _ptr(d_weight), _ptr(d_norm_bias), *order,
        )  # fmt: skip
        space = workspace("edit_add_norm_backward", args, device)
        call["edit_add_norm_backward"](*args, _ptr(space), stream_of())
        grads[-1] = _finish_coefficient(grads[-1], coefficient)
        if shared:
            d_residual = d_x if needs[7] else None
        return d_x, d_residual, *grads, d_weight, d_norm_bias

    def plain_edit_add_norm_backward(
        grad_residual, grad_normed, out, x, residual, weight, mean, rstd, scale, bias, on_sum, kind, needs, needs_norm
    ):
        """(d_x, d_residual, d_scale, d_bias, d_weight, d_norm_bias): contiguous rows of one dtype and any shape."""
        width, code = out.shape[-1], DTYPE[out.dtype]
        shared = on_sum and (needs[0] or needs[7])
        d_x = torch.empty_like(out) if needs[0] or shared else None
        d_residual = torch.empty_like(out) if needs[7] and not shared else None
        d_scale = torch.empty_like(scale) if needs[1] else None
        d_bias = torch.empty_like(bias) if needs[2] else None
        d_weight, d_norm_bias = (
            torch.empty(width, dtype=torch.float32, device=out.device) if wanted else None for wanted in needs_norm
        )
        args = (
            out.numel() // width, width, _ptr(scale), _ptr(bias), 0, 0, 0, 0, 1, 0, 0, 0, code, code, _ptr(grad_residual),
            width, _ptr(grad_normed), width, out.data_ptr(), _ptr(x), width, _ptr(residual if on_sum and x is not None else None),
            width, _ptr(weight), _ptr(mean), _ptr(rstd), 0, 0, int(on_sum), kind, _ptr(d_x), _ptr(d_residual), _ptr(d_scale),
            _ptr(d_bias), 0, 0, 0, 0, _ptr(d_weight), _ptr(d_norm_bias), 0, 0, 0,
        )  # fmt: skip
        space = workspace("edit_add_norm_backward", args, out.device)
        direct_norm_backward(*args, _ptr(space), stream_of())
        if shared:
            d_residual = d_x if needs[7] else None
        return d_x, d_residual, d_scale, d_bias, d_weight, d_norm_bias

    def project_backward(grad_z, hidden, read, needs, out_dtype):
        rows, rank = grad_z.shape
        width, device = read.shape[-1], grad_z.device
        d_hidden = torch.empty((rows, width), dtype=out_dtype, device=device) if needs[0] else None
        d_read = _like(read, needs[1])
        d_offset = torch.empty(rank, dtype=torch.float32, device=device) if needs[2] else None
        args = (
            rows, width, rank, DTYPE[out_dtype], grad_z.data_ptr(), *_rows(hidden), _ptr(read), _ptr(d_hidden),
            _ptr(d_read), _ptr(d_offset),
        )  # fmt: skip
        space = workspace("project_backward", args, device)
        call["project_backward"](*args, _ptr(space), stream_of())
        return d_hidden, d_read, d_offset

    def moments(hidden, group, groups):
        (rows, width), device = hidden.shape, hidden.device
        count = torch.full((1,), rows, dtype=torch.int64, device=device)
        kept, order = _slot_order(group, groups)
        if kept is not None:
            count = kept[1].diff().to(torch.int64)
        pairs = torch.empty((2, 2, groups, width), dtype=torch.float32, device=device)  # mean, m2: high parts, low parts
        args = (
            rows, width, groups, DTYPE[hidden.dtype], hidden.data_ptr(), hidden.stride(0), *order,
            pairs[0].data_ptr(), pairs[1].data_ptr(),
        )  # fmt: skip
        space = workspace("moments", args, device)
        call["moments"](*args, _ptr(space), stream_of())
        wide = pairs.double()
        return count, wide[0, 0] + wide[0, 1], wide[1, 0] + wide[1, 1]

    def value_ascent(hidden, weight, bias, weight2, bias2, head, gram, steps, step_size):
        rows, width = hidden.shape
        if name == "cuda":  # where the dense products are cuBLAS's
            flips = total_gradient if weight.shape[0] <= MAX_UNITS else None
            return ascend(hidden, weight, bias, weight2, bias2, head, gram, steps, step_size, flips)
        units2 = 0 if weight2 is None else weight2.shape[0]
        sizes = (rows, width, weight.shape[0], units2, steps, step_size, DTYPE[hidden.dtype])
        out = torch.empty((rows, width), dtype=hidden.dtype, device=hidden.device)
        call["value_ascent"](
            *sizes, hidden.data_ptr(), hidden.stride(0), *map(_ptr, (weight, bias, weight2, bias2, head, gram, out)),
            0, 0, 0, stream_of(),
        )  # fmt: skip
        return out

    def total_gradient(z, slope, head, gram, steps, step_size):
        """reference.value_ascent.ascend's `flips`."""
        total = torch.empty_like(z)
        call["value_ascent"](
            len(z), 0, z.shape[1], 0, steps, step_size, 0, *[0] * 6, *map(_ptr, (head, gram)), 0,
            *map(_ptr, (z, slope, total)), stream_of(),
        )  # fmt: skip
        return total

    names = (plain_edit, plain_edit_add, plain_edit_add_norm, plain_edit_backward, edit, edit_add, edit_add_norm, project)
    names += (plain_edit_add_norm_backward, edit_backward, edit_add_norm_backward, project_backward, moments, value_ascent)
    served = {function.__name__: guard(function) for function in names}
    return types.SimpleNamespace(
        __name__=name, any_shape=True, **served, edit_add_backward=served["edit_backward"]
    )


def backend(name):
    """The backend `cpu` or `cuda`, or BackendError with the reason it is not there."""
    if _native is None:
        raise BackendError(f"the native module is not built ({_missing}); see `fastedit doctor`")
    if name == "cuda" and not _native.CUDA_ARCHITECTURES:
        raise BackendError("the native module was built without a CUDA compiler; see `fastedit doctor`")
    return _make(name)
