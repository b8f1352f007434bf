"""From tensors of any shape to a backend's rows and back: what both faces of the ops (eager and traced) run.

Arguments have been checked. `flat` gives the kernels (rows, width) with a unit inner stride, a view wherever
strides allow one.
"""

import math

import torch

from .dispatch import load, select
from .native import (
    try_edit,
    try_edit_add,
    try_edit_add_norm,
    try_edit_add_norm_backward,
    try_edit_backward,
    try_project,
)

MAX_DIMS = 16  # that the native module takes (csrc/tensors.h)


def flat(tensor):
    """(rows, width) with unit inner stride: a view if strides allow, else a copy. None stays None."""
    if tensor is None:
        return None
    if tensor.dim() != 2:
        width = tensor.shape[-1]
        rows = tensor.numel() // width if width else math.prod(tensor.shape[:-1])
        tensor = tensor.view(rows, width) if tensor.is_contiguous() else tensor.reshape(rows, width)
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def per_row(tensor):
    """(rows,) contiguous, or the one element shared by all rows."""
    return None if tensor is None else tensor.reshape(-1).contiguous()


def _device_type(tensor):
    return "cpu" if tensor.is_cpu else tensor.device.type


def _backend(width, *key):
    """The backend that serves; rows of no columns, whose pointers are null, have nothing for a kernel."""
    return select(*key) if width else load("reference")


def as_rows(tensor, backend):
    """The tensor as the backend takes it: any contiguous shape where it says so, else (rows, width)."""
    if tensor is not None and backend.any_shape and tensor.is_contiguous() and tensor.dim() <= MAX_DIMS:
        return tensor
    return flat(tensor)


def _contiguous(parameter):
    return parameter if parameter is None or parameter.is_contiguous() else parameter.contiguous()


def _check_slots(slot, slots):
    """On the host a slot out of range is an error whichever backend serves; on a GPU looking would stall the stream."""
    if slot is None or not slot.is_cpu:
        return
    wrong = ((slot < -1) | (slot >= slots)).reshape(-1).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise IndexError(
            f"slot of row {row} is {int(slot.reshape(-1)[row])}, expected -1 (untouched) or 0 to {slots - 1}"
        )


def flat_form(scale, bias, read, offset, write, slot, coefficient):
    _check_slots(slot, next((p.shape[0] for p in (scale, bias, read) if p is not None), 1))
    if read is None and slot is None and coefficient is None:
        return _contiguous(scale), _contiguous(bias), None, None, None, None, None
    return (
        _contiguous(scale), _contiguous(bias), _contiguous(read), _contiguous(offset), _contiguous(write),
        per_row(slot), per_row(coefficient),
    )  # fmt: skip


def _gated(gate, rule):
    """As a backend takes them; those without gates serve all other calls."""
    return {} if gate is None else {"gate": _contiguous(gate), "rule": _contiguous(rule)}


def _reshaped(rows, *outputs):
    """Outputs (rows, …) with rows' leading shape; as they are where the backend has kept it."""
    dims = rows.dim()
    if all(o is None or o.dim() == dims for o in outputs):
        return outputs
    lead = rows.shape[:-1]
    return tuple(o if o is None else o.view(*lead, o.shape[-1]) for o in outputs)


def run_edit(hidden, scale, bias, read, offset, write, slot, coefficient, want_z, gate=None, rule=None):
    """(h', z or None)."""
    done = try_edit(hidden, scale, bias, read, offset, write, slot, coefficient, want_z, gate, rule)
    if done is not None:
        return done
    backend = _backend(hidden.shape[-1], _device_type(hidden), hidden.dtype)
    form = flat_form(scale, bias, read, offset, write, slot, coefficient)
    out, z = backend.edit(as_rows(hidden, backend), *form, want_z, **_gated(gate, rule))
    return _reshaped(hidden, out, z)


def run_edit_add(
    x, residual, scale, bias, read, offset, write, slot, coefficient, on_sum, want_z, gate=None, rule=None
):
    """(residual', z or None)."""
    done = try_edit_add(x, residual, scale, bias, read, offset, write, slot, coefficient, on_sum, want_z, gate, rule)
    if done is not None:
        return done
    backend = _backend(x.shape[-1], _device_type(x), x.dtype, residual.dtype, on_sum)
    form = flat_form(scale, bias, read, offset, write, slot, coefficient)
    out, z = backend.edit_add(*_pair(x, residual, backend), *form, on_sum, want_z, **_gated(gate, rule))
    return _reshaped(x, out, z)


def _pair(x, residual, backend):
    """x and residual, both in their own shape or both as (rows, width)."""
    if backend.any_shape and x.is_contiguous() and residual.is_contiguous() and x.dim() <= MAX_DIMS:
        return x, residual
    return flat(x), flat(residual)


def run_edit_add_norm(
    x, residual, weight, norm_bias, scale, bias, read, offset, write, slot, coefficient,
    on_sum, kind, eps, want_z, want_residual, want_stats, gate=None, rule=None,
):  # fmt: skip
    """(residual' or None, normed, z or None, mean or None, rstd or None)."""
    done = try_edit_add_norm(
        x, residual, weight, norm_bias, scale, bias, read, offset, write, slot, coefficient,
        on_sum, kind, eps, want_z, want_residual, want_stats, gate, rule,
    )  # fmt: skip
    if done is not None:
        return done
    dtype, residual_dtype = x.dtype, residual.dtype
    out_dtype = dtype if dtype is residual_dtype else torch.promote_types(dtype, residual_dtype)
    backend = _backend(x.shape[-1], _device_type(x), dtype, residual_dtype, on_sum)
    weight, norm_bias = _norm_parameter(weight, out_dtype), _norm_parameter(norm_bias, out_dtype)
    form = flat_form(scale, bias, read, offset, write, slot, coefficient)
    out, normed, z, mean, rstd = backend.edit_add_norm(
        *_pair(x, residual, backend), weight, norm_bias, *form, on_sum, kind, eps, want_z, want_residual, want_stats,
        **_gated(gate, rule),
    )  # fmt: skip
    return *_reshaped(x, out, normed, z), mean, rstd


def _norm_parameter(parameter, dtype):
    if parameter is None:
        return None
    if parameter.dtype != dtype:
        raise TypeError(
            f"the norm's weight has dtype {parameter.dtype} and the residual {dtype}, expected the same dtype"
        )
    return _contiguous(parameter)


def run_project(hidden, read, offset):
    done = try_project(hidden, read, offset)
    if done is not None:
        return done
    backend = _backend(hidden.shape[-1], _device_type(hidden), hidden.dtype)
    z = backend.project(flat(hidden), _contiguous(read), _contiguous(offset))
    return z.view(*hidden.shape[:-1], read.shape[0])


def run_moments(hidden, group, groups):
    """(count (groups,) int64, mean (groups, width) float64, m2 likewise)."""
    backend = _backend(hidden.numel(), _device_type(hidden), hidden.dtype)  # no rows: nothing for a kernel
    return backend.moments(flat(hidden), per_row(group), groups)


def run_value_ascent(hidden, weight, bias, weight2, bias2, head, gram, steps, step_size):
    if steps == 0 or hidden.numel() == 0:
        return hidden.clone(memory_format=torch.contiguous_format)
    backend = select(_device_type(hidden), hidden.dtype)
    net = (_contiguous(t) for t in (weight, bias, weight2, bias2, head, gram))
    return backend.value_ascent(flat(hidden), *net, steps, step_size).view(hidden.shape)


def run_edit_backward(
    grad, hidden, residual, scale, bias, read, offset, write, slot, coefficient, grad_z, z, needs, dtype, backend=None
):
    """Seven gradients or None: hidden in `dtype`, rows in their own shape; parameters fp32 in their own shapes.

    backend: the one to ask, or None for the one that serves.
    """
    grads = None if backend else try_edit_backward(
        grad, hidden, residual, scale, bias, read, offset, write, slot, coefficient, grad_z, z, needs, dtype
    )
    some = next(t for t in (grad, hidden, grad_z) if t is not None)
    if grads is None:
        form = flat_form(scale, bias, read, offset, write, slot, coefficient)
        width = next(t for t in (grad, hidden, read) if t is not None).shape[-1]
        key = (some.device.type, dtype, None if grad is None else _second(dtype, grad.dtype), False)
        backend = backend or _backend(width and some.numel(), *key)  # no rows: nothing for a kernel
        grads = backend.edit_backward(
            flat(grad), flat(hidden), flat(residual), *form, flat(grad_z), flat(z), needs, dtype
        )
    return _shaped(grads, 1, some, (scale, bias, read, offset, write, coefficient))


def _second(dtype, grad_dtype):
    return None if dtype == grad_dtype else grad_dtype


def _shaped(grads, streams, rows, parameters):
    """Gradients of rows in the rows' shape, of parameters in the parameters' own; a shared coefficient's summed."""
    of_rows = [g if g is None or g.dim() == rows.dim() else g.view(*rows.shape[:-1], g.shape[-1]) for g in grads[:streams]]
    *of_form, d_k = grads[streams : streams + 6]
    of_form = [g if g is None or g.shape == p.shape else g.view(p.shape) for g, p in zip(of_form, parameters, strict=False)]
    if d_k is not None:
        d_k = (d_k if d_k.numel() == parameters[5].numel() else d_k.sum()).view(parameters[5].shape)
    return *of_rows, *of_form, d_k, *grads[streams + 6 :]


def run_edit_add_norm_backward(
    grad_residual, grad_normed, residual_out, x, residual, weight, mean, rstd, scale, bias, read, offset, write,
    slot, coefficient, grad_z, z, on_sum, kind, needs, needs_norm, x_dtype, residual_dtype, backend=None,
):  # fmt: skip
    """(d_x, d_residual, six parameter gradients, d_weight, d_norm_bias), each a tensor or None."""
    grads = None if backend else try_edit_add_norm_backward(
        grad_residual, grad_normed, residual_out, x, residual, weight, mean, rstd, scale, bias, read, offset, write,
        slot, coefficient, grad_z, z, on_sum, kind, needs, needs_norm, x_dtype, residual_dtype,
    )  # fmt: skip
    if grads is None:
        key = (residual_out.device.type, x_dtype, residual_dtype, on_sum)
        backend = backend or _backend(residual_out.numel(), *key)
        form = flat_form(scale, bias, read, offset, write, slot, coefficient)
        grads = backend.edit_add_norm_backward(
            flat(grad_residual), flat(grad_normed), flat(residual_out), flat(x), flat(residual), _contiguous(weight),
            mean, rstd, *form, flat(grad_z), flat(z), on_sum, kind, needs, needs_norm, x_dtype, residual_dtype,
        )  # fmt: skip
    return _shaped(grads, 2, residual_out, (scale, bias, read, offset, write, coefficient))


def run_project_backward(grad_z, hidden, read, needs, dtype, backend=None):
    backend = backend or _backend(read.shape[-1] and grad_z.numel(), grad_z.device.type, dtype)
    d_hidden, *rest = backend.project_backward(flat(grad_z), flat(hidden), _contiguous(read), needs, dtype)
    return None if d_hidden is None else d_hidden.view(*grad_z.shape[:-1], read.shape[-1]), *rest
