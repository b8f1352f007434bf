"""Autograd of the ops, once for both faces: the eager autograd.Function and the registered operators.

`setup_*` decides what is saved (bias-only training saves no hidden states). `backward_*` calls the fused backward for
exactly the gradients that are wanted. Formulas: docs/design.md, 4. If a gradient of gradients is wanted
(create_graph=True), the backward is the reference's, in operations that autograd sees.

The eager Functions take ctx in forward. With a setup_context, torch inspects forward's signature at every call (119 µs
for one row of 64 columns, where this took 46, with other work running beside).
"""

import torch
from torch.autograd import Function

from ..kernels import reference
from ..kernels.reference.edit_add_norm import norm as norm_by_definition
from . import registered as torch_library
from .implementation import (
    run_edit,
    run_edit_add,
    run_edit_add_norm,
    run_edit_add_norm_backward,
    run_edit_backward,
    run_project,
    run_project_backward,
)
from .parameter_changes import transformed

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_EXACT = (torch.float32, torch.float64)


def _again():
    """Whether this backward is itself differentiated, backward or forward (its gradients may have tangents)."""
    return (torch.is_grad_enabled() or transformed()) and not torch.compiler.is_compiling()


def _traced(*tensors):
    return torch.compiler.is_compiling() or any(t is not None and type(t) not in _PLAIN for t in tensors)


def _form_needs(needs, scale, read):
    """(needs of scale, bias, read, offset, write, coefficient; whether the edit's input is read; whether z is read)."""
    d_scale, _, d_read, _, d_write, _, d_k = needs  # in the order scale, bias, read, offset, write, slot, coefficient
    reads_hidden = d_scale or d_read or (d_k and scale is not None)
    reads_z = read is not None and (d_write or d_k)
    return (*needs[:5], d_k), reads_hidden, reads_z


def _recovers(needs, scale, bias, slot, coefficient):
    """Whether the gradient of `read` can be computed from the edit's output h' = h + k (z @ write) in place of its
    input.

    The output exists anyway, because the norm that comes next saves it. So a low-rank edit that trains on the sum keeps
    no rows of its own, where autograd of the plain expression keeps h.
    """
    one = coefficient is None or coefficient.numel() == 1
    return needs[2] and needs[4] and scale is None and bias is None and slot is None and one


def _at_input(d_read, d_write, form, grad_z, z):
    """d_read = qᵀ h from qᵀ h': subtract k (qᵀ z) write. q = k (G @ writeᵀ) + dz, qᵀ z = write d_writeᵀ + dzᵀ z."""
    coefficient, wide = form[6], d_read.dtype  # the reference's sums of float64 rows are float64
    write = form[4].to(wide)
    mixed = write @ d_write.mT.to(wide)
    if grad_z is not None:
        mixed = mixed + (grad_z.flatten(0, -2).mT @ z.flatten(0, -2)).to(wide)
    mixed = mixed if coefficient is None else mixed * coefficient
    return torch.addmm(d_read, mixed, write, alpha=-1)


def _given(tensor):
    """None if an operator returned an empty tensor, which means absent."""
    return None if tensor is None or tensor.numel() == 0 else tensor


# --- edit -----------------------------------------------------------------------------------------------------


def setup_edit(ctx, inputs, output):
    hidden, scale, bias, read, offset, write, slot, coefficient = inputs
    ctx.set_materialize_grads(False)
    ctx.form_needs, reads_hidden, reads_z = _form_needs(ctx.needs_input_grad[1:8], scale, read)
    ctx.dtype = hidden.dtype
    # in bf16 the output's rounding would be the gradient's: eager's own reads the exact input here
    ctx.recovers = hidden.dtype in _EXACT and _recovers(ctx.form_needs, scale, bias, slot, coefficient)
    rows = output[0] if ctx.recovers else hidden
    ctx.save_for_backward(
        rows if reads_hidden else None, scale, bias, read, offset, write, slot, coefficient,
        output[1] if reads_z else None,
    )  # fmt: skip


def backward_edit(ctx, grad, grad_z):
    hidden, *form, z = ctx.saved_tensors
    if grad is None and grad_z is None:
        return (None,) * 8
    d_hidden, *d_form, d_k = edit_gradients(
        grad, hidden, None, *form, grad_z if form[2] is not None else None, z,
        (ctx.needs_input_grad[0], *ctx.form_needs), ctx.dtype,
    )  # fmt: skip
    if ctx.recovers:
        d_form[2] = _at_input(d_form[2], d_form[4], form, grad_z, z)
    return d_hidden, *d_form, None, d_k


def edit_gradients(
    grad, hidden, residual, scale, bias, read, offset, write, slot, coefficient, grad_z, z, needs, dtype
):
    """Seven gradients of an edit, by the plain call, or by the operator while tracing."""
    args = (grad, hidden, residual, scale, bias, read, offset, write, slot, coefficient, grad_z, z)
    if _again():
        return run_edit_backward(*args, needs, dtype, reference)
    if _traced(grad, grad_z):
        grads = torch_library.edit_backward(*args, list(needs), dtype)
        return [g if n else None for g, n in zip(grads, needs, strict=True)]
    return run_edit_backward(*args, needs, dtype)


class EditFunction(Function):
    @staticmethod
    def forward(ctx, *inputs):
        output = run_edit(*inputs, inputs[3] is not None)
        setup_edit(ctx, inputs, output)
        return output

    backward = staticmethod(backward_edit)


# --- edit_add -------------------------------------------------------------------------------------------------


def setup_edit_add(ctx, inputs, output):
    x, residual, scale, bias, read, offset, write, slot, coefficient, on_sum = inputs
    ctx.set_materialize_grads(False)
    ctx.form_needs, reads_hidden, reads_z = _form_needs(ctx.needs_input_grad[2:9], scale, read)
    ctx.x_dtype, ctx.residual_dtype, ctx.on_sum = x.dtype, residual.dtype, on_sum
    ctx.recovers = on_sum and x.dtype is residual.dtype and _recovers(ctx.form_needs, scale, bias, slot, coefficient)
    rows = output[0] if ctx.recovers else x
    ctx.save_for_backward(
        rows if reads_hidden else None, residual if reads_hidden and on_sum and not ctx.recovers else None,
        scale, bias, read, offset, write, slot, coefficient, output[1] if reads_z else None,
    )  # fmt: skip


def backward_edit_add(ctx, grad, grad_z):
    x, residual, *form, z = ctx.saved_tensors
    if grad is None and grad_z is None:
        return (None,) * 10
    need_x, need_residual = ctx.needs_input_grad[:2]
    need_rows = need_x or (ctx.on_sum and need_residual)
    dtype = torch.promote_types(ctx.x_dtype, ctx.residual_dtype) if ctx.on_sum else ctx.x_dtype
    needs = (need_rows, *ctx.form_needs)
    if ctx.on_sum and x is not None and ctx.x_dtype is not ctx.residual_dtype:
        x, residual = x.to(dtype), residual.to(dtype)  # one dtype for both: exact, as their sum is in the wider
    d_rows, *d_form, d_k = (None,) * 7  # the residual's gradient alone is grad itself
    if any(needs):
        d_rows, *d_form, d_k = edit_gradients(
            grad, x, residual, *form, grad_z if form[2] is not None else None, z, needs, dtype
        )
        if ctx.recovers:
            d_form[2] = _at_input(d_form[2], d_form[4], form, grad_z, z)
    d_residual = None
    if need_residual:
        d_residual = d_rows if ctx.on_sum else grad
        d_residual = None if d_residual is None else d_residual.to(ctx.residual_dtype)
    d_x = d_rows.to(ctx.x_dtype) if need_x else None
    return d_x, d_residual, *d_form, None, d_k, None


class EditAddFunction(Function):
    @staticmethod
    def forward(ctx, *inputs):
        output = run_edit_add(*inputs, inputs[4] is not None)
        setup_edit_add(ctx, inputs, output)
        return output

    backward = staticmethod(backward_edit_add)


# --- edit_add_norm --------------------------------------------------------------------------------------------


def setup_edit_add_norm(ctx, inputs, output):
    x, residual, weight, _, scale, bias, read, offset, write, slot, coefficient, on_sum, kind, ctx.eps = inputs
    out, _, z, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(t for t in (mean, rstd) if t is not None))
    ctx.form_needs, reads_hidden, reads_z = _form_needs(ctx.needs_input_grad[4:11], scale, read)
    ctx.x_dtype, ctx.residual_dtype, ctx.on_sum, ctx.kind = x.dtype, residual.dtype, on_sum, kind
    ctx.recovers = on_sum and x.dtype is residual.dtype and _recovers(ctx.form_needs, scale, bias, slot, coefficient)
    keeps = reads_hidden and not ctx.recovers
    ctx.save_for_backward(
        out, x if keeps else None, residual if keeps and on_sum else None, weight, mean, rstd,
        scale, bias, read, offset, write, slot, coefficient, z if reads_z else None,
    )  # fmt: skip


def backward_edit_add_norm(ctx, grad_residual, grad_normed, grad_z, _mean, _rstd):
    out, x, residual, weight, mean, rstd, *form, z = ctx.saved_tensors
    if grad_residual is None and grad_normed is None and grad_z is None:
        return (None,) * 14
    need_x, need_residual, need_weight, need_norm_bias = ctx.needs_input_grad[:4]
    needs = (need_x, *ctx.form_needs, need_residual)
    needs_norm = (need_weight and grad_normed is not None, need_norm_bias and grad_normed is not None)
    x = out if ctx.recovers else x
    args = (
        grad_residual, grad_normed, out, x, residual, weight, _given(mean), rstd, *form,
        grad_z if form[2] is not None else None, z, ctx.on_sum, ctx.kind,
    )  # fmt: skip
    dtypes = (ctx.x_dtype, ctx.residual_dtype)
    if _again():
        rows = out.reshape(-1, out.shape[-1])
        _, mean, rstd = norm_by_definition(rows, weight, None, ctx.kind, ctx.eps)  # those that were saved have no history
        args = (*args[:6], mean, rstd, *args[8:])
        grads = list(run_edit_add_norm_backward(*args, needs, needs_norm, *dtypes, reference))
    elif _traced(grad_residual, grad_normed, grad_z):
        grads = torch_library.edit_add_norm_backward(*args, list(needs), list(needs_norm), *dtypes)
        wanted = (need_x, need_residual, *ctx.form_needs, *needs_norm)
        grads = [g if n else None for g, n in zip(grads, wanted, strict=True)]
        if torch_library.one_gradient(ctx.on_sum, needs, *dtypes):
            grads[1] = grads[0]
    else:
        grads = list(run_edit_add_norm_backward(*args, needs, needs_norm, *dtypes))
    d_x, d_residual, *d_form, d_k, d_weight, d_norm_bias = grads
    if ctx.recovers:
        d_form[2] = _at_input(d_form[2], d_form[4], form, grad_z, z)
    d_x = d_x if need_x else None
    return d_x, d_residual, *_norm_dtypes(d_weight, d_norm_bias, weight, out), *d_form, None, d_k, None, None, None


def _norm_dtypes(d_weight, d_norm_bias, weight, out):
    return (
        None if d_weight is None else d_weight.to(weight.dtype),
        None if d_norm_bias is None else d_norm_bias.to(out.dtype),
    )


class EditAddNormFunction(Function):
    @staticmethod
    def forward(ctx, *inputs):
        output = run_edit_add_norm(*inputs, inputs[6] is not None, True, True)
        setup_edit_add_norm(ctx, inputs, output)
        return output

    backward = staticmethod(backward_edit_add_norm)


# --- project --------------------------------------------------------------------------------------------------


def setup_project(ctx, inputs, output):
    hidden, read, _ = inputs
    need_read = ctx.needs_input_grad[1]
    ctx.dtype = hidden.dtype
    ctx.save_for_backward(hidden if need_read else None, read)


def backward_project(ctx, grad_z):
    hidden, read = ctx.saved_tensors
    needs = tuple(ctx.needs_input_grad[:3])
    if _again():
        d_hidden, d_read, d_offset = run_project_backward(grad_z, hidden, read, needs, ctx.dtype, reference)
    elif _traced(grad_z):
        grads = torch_library.project_backward(grad_z, hidden, read, list(needs), ctx.dtype)
        d_hidden, d_read, d_offset = (g if n else None for g, n in zip(grads, needs, strict=True))
    else:
        d_hidden, d_read, d_offset = run_project_backward(grad_z, hidden, read, needs, ctx.dtype)
    return d_hidden, d_read, d_offset


class ProjectFunction(Function):
    @staticmethod
    def forward(ctx, *inputs):
        output = run_project(*inputs)
        setup_project(ctx, inputs, output)
        return output

    backward = staticmethod(backward_project)


def register():
    """Give the registered operators the same autograd."""
    for name, setup, backward in (
        ("edit", setup_edit, backward_edit),
        ("edit_add", setup_edit_add, backward_edit_add),
        ("edit_add_norm", setup_edit_add_norm, backward_edit_add_norm),
        ("project", setup_project, backward_project),
    ):
        torch.library.register_autograd(
            f"fastedit::{name}", backward, setup_context=setup, lib=torch_library.library
        )


register()
