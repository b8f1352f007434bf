"""Autograd of the ops, once for both faces: the eager autograd.Function and the registered operators.

An op's setup decides what is saved (bias-only training saves no hidden states). Its backward calls the fused backward
for exactly the gradients that are wanted. Formulas: docs/design.md, 4. If a gradient of gradients is wanted
(create_graph=True), the backward is the reference's, in operations that autograd sees.

The eager Functions take ctx in forward. With a setup_context, torch inspects forward's signature at every call (119 µs
for one row of 64 columns, where this took 46, with other work running beside).
"""

import torch
from torch.autograd import Function

from ..kernels.reference.edit_add_norm import norm as norm_by_definition
from . import registered as torch_library
from .dispatch import load
from .parameter_changes import transformed
from .running import PLAIN, run

_PLAIN = (*PLAIN, type(None))
_EXACT = (torch.float32, torch.float64)


def gradients(op, *args):
    """The gradients of a backward op (arguments.SCHEMAS), None for those not wanted. While tracing, its operator's."""
    if not torch.compiler.is_compiling():
        if torch.is_grad_enabled() or transformed():  # it is to be differentiated itself, or its gradients may have tangents
            return run(op, *args, backend=load("reference"))
        if type(args[0]) in _PLAIN and type(args[1]) in _PLAIN:
            return run(op, *args)
    grads = torch_library.OPERATORS[op](*([*a] if type(a) is tuple else a for a in args))
    if op != "edit_add_norm_backward":
        needs = args[3] if op == "project_backward" else args[12]
        return [g if n else None for g, n in zip(grads, needs, strict=True)]
    on_sum, needs, needs_norm, dtypes = args[17], args[19], args[20], args[21:]
    wanted = (needs[0], needs[7], *needs[1:7], *needs_norm)
    grads = [g if n else None for g, n in zip(grads, wanted, strict=True)]
    if torch_library.one_gradient(on_sum, needs, *dtypes):
        grads[1] = grads[0]
    return grads


def _recovers(needs, scale, bias, slot, coefficient):
    """Whether the gradient of `read` can be computed from the edit's output h' = h + k (z @ write) in place of its
    input.

    The output exists anyway, because the norm that comes next saves it. So a low-rank edit that trains on the sum keeps
    no rows of its own, where autograd of the plain expression keeps h.
    """
    one = coefficient is None or coefficient.numel() == 1
    return needs[2] and needs[4] and scale is None and bias is None and slot is None and one


def _at_input(d_read, d_write, write, coefficient, grad_z, z):
    """d_read = qᵀ h from qᵀ h': subtract k (qᵀ z) write. q = k (G @ writeᵀ) + dz, qᵀ z = write d_writeᵀ + dzᵀ z."""
    write = write.to(d_read.dtype)  # the reference's sums of float64 rows are float64
    mixed = write @ d_write.mT.to(write.dtype)
    if grad_z is not None:
        mixed = mixed + (grad_z.flatten(0, -2).mT @ z.flatten(0, -2)).to(write.dtype)
    mixed = mixed if coefficient is None else mixed * coefficient
    return torch.addmm(d_read, mixed, write, alpha=-1)


def _edit_op(streams, norms):
    """(setup, backward) of edit (1 stream), edit_add (2) and edit_add_norm (2, with 2 parameters of the norm)."""
    first = streams + norms  # of the form

    def setup(ctx, inputs, output):
        x, residual = inputs[0], inputs[1] if streams == 2 else None
        scale, bias, read, _, _, slot, coefficient = form = inputs[first : first + 7]
        needs = ctx.needs_input_grad[first : first + 7]
        ctx.needs = needs = (*needs[:5], needs[6])
        ctx.set_materialize_grads(False)
        reads_x = needs[0] or needs[2] or (needs[5] and scale is not None)
        reads_z = read is not None and (needs[4] or needs[5])
        ctx.on_sum = on_sum = streams == 2 and inputs[first + 7]
        ctx.dtypes = x.dtype, x.dtype if residual is None else residual.dtype
        # in bf16 the output's rounding would be an edit's gradient's: eager's own reads the exact input there
        may = ctx.dtypes[0] is ctx.dtypes[1] and (on_sum if streams == 2 else x.dtype in _EXACT)
        ctx.recovers = may and _recovers(needs, scale, bias, slot, coefficient)
        keeps = reads_x and not ctx.recovers
        out = output[0] if norms or (reads_x and ctx.recovers) else None
        z = output[1 + (norms > 0)] if reads_z else None
        norm = ()
        if norms:
            _, _, _, mean, rstd = output
            ctx.mark_non_differentiable(*(t for t in (mean, rstd) if t is not None))
            norm, ctx.kind, ctx.eps = (inputs[2], mean, rstd), *inputs[first + 8 :]
        ctx.save_for_backward(out, x if keeps else None, residual if keeps and on_sum else None, *form, z, *norm)

    def backward(ctx, *grads):
        out, x, residual, *saved = ctx.saved_tensors  # once: a checkpoint computes them again for this
        form, z, norm = saved[:7], saved[7], saved[8:]
        *outs, grad_z = grads[: 2 + (norms > 0)]
        if grad_z is None and all(g is None for g in outs):
            return (None,) * len(ctx.needs_input_grad)
        grad_z = None if form[2] is None else grad_z
        need_x, need_residual = ctx.needs_input_grad[0], streams == 2 and ctx.needs_input_grad[1]
        x = out if ctx.recovers else x
        args = (x, residual, form, grad_z, z, need_x, need_residual)
        if norms:
            d_x, d_residual, d_form, d_norm = _through_norm(ctx, *outs, out, *norm, *args)
        else:
            d_x, d_residual, d_form, d_norm = _through_edit(ctx, *outs, *args)
        if ctx.recovers and d_form[2] is not None:
            d_form[2] = _at_input(d_form[2], d_form[4], form[4], form[6], grad_z, z)
        *d_form, d_k = d_form
        d_rows = (d_x if need_x else None, d_residual)[:streams]
        return *d_rows, *d_norm, *d_form, None, d_k, *(None,) * (len(ctx.needs_input_grad) - first - 7)

    return setup, backward


def _through_edit(ctx, grad, x, residual, form, grad_z, z, need_x, need_residual):
    """(d_x, d_residual, the form's, ()) if the op ends in the edit or the add."""
    x_dtype, residual_dtype = ctx.dtypes
    dtype = torch.promote_types(*ctx.dtypes) if ctx.on_sum else x_dtype
    if ctx.on_sum and x is not None and x_dtype is not residual_dtype:
        x, residual = x.to(dtype), residual.to(dtype)  # one dtype for both: exact, as their sum is in the wider
    needs = (need_x or (ctx.on_sum and need_residual), *ctx.needs)
    d_rows, d_form = None, [None] * 6  # the residual's gradient alone is grad itself
    if any(needs):
        d_rows, *d_form = gradients("edit_backward", grad, x, residual, *form, grad_z, z, needs, dtype)
    d_residual = (d_rows if ctx.on_sum else grad) if need_residual else None
    d_x, d_residual = (
        d if d is None or d.dtype is to else d.to(to) for d, to in ((d_rows, x_dtype), (d_residual, residual_dtype))
    )
    return d_x, d_residual, d_form, ()


def _through_norm(
    ctx, grad_residual, grad_normed, out, weight, mean, rstd, x, residual, form, grad_z, z, need_x, need_residual
):  # fmt: skip
    """(d_x, d_residual, the form's, the norm's two) if a norm follows."""
    mean = mean if ctx.kind == 2 else None
    if (torch.is_grad_enabled() or transformed()) and not torch.compiler.is_compiling():
        rows = out.reshape(-1, out.shape[-1])
        _, mean, rstd = norm_by_definition(rows, weight, None, ctx.kind, ctx.eps)  # those that were saved have no history
    needs_norm = tuple(n and grad_normed is not None for n in ctx.needs_input_grad[2:4])
    d_x, d_residual, *d_form, d_weight, d_norm_bias = gradients(
        "edit_add_norm_backward", grad_residual, grad_normed, out, x, residual, weight, mean, rstd, *form, grad_z, z,
        ctx.on_sum, ctx.kind, (need_x, *ctx.needs, need_residual), needs_norm, *ctx.dtypes,
    )  # fmt: skip
    d_norm = (
        None if d_weight is None else d_weight.to(weight.dtype),
        None if d_norm_bias is None else d_norm_bias.to(out.dtype),
    )
    return d_x, d_residual, d_form, d_norm


def _setup_project(ctx, inputs, output):
    hidden, read, _ = inputs
    ctx.dtype = hidden.dtype
    ctx.save_for_backward(hidden if ctx.needs_input_grad[1] else None, read)


def _backward_project(ctx, grad_z):
    return tuple(gradients("project_backward", grad_z, *ctx.saved_tensors, tuple(ctx.needs_input_grad[:3]), ctx.dtype))


def _function(op, setup, backward):
    """The eager Function of an op, and the operator's autograd."""
    place = {"edit": 3, "edit_add": 4, "edit_add_norm": 6}.get(op)  # of `read`: where there is one, z is kept

    def forward(ctx, *inputs):
        more = () if place is None else (inputs[place] is not None, *(True,) * (2 * (op == "edit_add_norm")))
        output = run(op, *inputs, *more)
        setup(ctx, inputs, output)
        return output

    torch.library.register_autograd(f"fastedit::{op}", backward, setup_context=setup, lib=torch_library.library)
    name = op.title().replace("_", "") + "Function"
    return type(name, (Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)})


FUNCTIONS = {
    "edit": _function("edit", *_edit_op(1, 0)),
    "edit_add": _function("edit_add", *_edit_op(2, 0)),
    "edit_add_norm": _function("edit_add_norm", *_edit_op(2, 2)),
    "project": _function("project", _setup_project, _backward_project),
}
