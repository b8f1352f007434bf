"""edit_add_norm: edit_add, then a norm of the stored (rounded) residual'.

    RMS    n̂ = r · rsqrt(mean(r²) + eps)
           normed = weight · round(n̂)                      Llama's order (norm RMS)
           normed = round(n̂ · (1 + weight))                Gemma's order (norm GEMMA)
    Layer  normed = round((r − mean(r)) · rstd · weight + norm_bias)   (norm LAYER)

Streams: x and residual in, residual' and normed out. Grid, what is kept and determinism: rows.py.
Backward, with g = grad_normed ⊙ gain and n̂ the unit row:
    G = grad_residual + rstd · (g − n̂ · mean(g ⊙ n̂) − [Layer] mean(g)),  then edit_add's backward of G
    weight Σ grad_normed ⊙ n̂   norm_bias Σ grad_normed
Its two row means come from one pass over grad_normed and residual' (a program a few rows, tile by tile);
columns.py then forms G where it needs it.
"""

import torch

from . import host
from .backward import Gradient, NormNeeds, form_backward
from .norm import LAYER, RMS, norm_means
from .rows import run_rows


def edit_add_norm(
    x, residual, weight, norm_bias, scale, bias, read, offset, write, slot, coefficient,
    on_sum=False, kind=RMS, eps=1e-6, want_z=False, want_residual=True, want_stats=True, gate=None, rule=None,
):  # fmt: skip
    """(residual', normed, z or None, mean (rows,) or None, rstd (rows,)); mean only for LAYER.

    want_residual False and want_stats False return None in their places; the residual is still rounded
    before the norm.
    """
    dtype = torch.promote_types(x.dtype, residual.dtype)
    normed = torch.empty(x.shape, dtype=dtype, device=x.device)
    out = torch.empty_like(normed) if want_residual else None
    rstd = torch.empty(x.shape[0], dtype=torch.float32, device=x.device) if want_stats else None
    mean = torch.empty_like(rstd) if want_stats and kind == LAYER else None
    form, rank = host.kernel_form(scale, bias, read, offset, write, slot, coefficient, gate, rule, want_z)
    z = host.empty_z(x, rank, want_z)
    norm = (normed, mean, rstd, host.dense(weight), host.dense(norm_bias), kind, float(eps))
    run_rows(host.stream(x), host.stream(residual), out, form, rank, z, on_sum, norm)
    return out, normed, z, mean, rstd


def edit_add_norm_backward(
    grad_residual, grad_normed, residual_out, x, residual, weight, mean, rstd,
    scale, bias, read, offset, write, slot, coefficient, grad_z, z, on_sum, kind, needs, needs_norm,
    x_dtype, residual_dtype,
):  # fmt: skip
    """(d_x, d_residual, d_scale, d_bias, d_read, d_offset, d_write, d_coefficient, d_weight, d_norm_bias).

    grad_residual or grad_normed may be None. `residual` is given (with x) where on_sum and the edit's
    parameters need it. needs: (x, scale, bias, read, offset, write, coefficient, residual);
    needs_norm: (weight, norm_bias). On the sum in one dtype, d_x and d_residual are one tensor.
    """
    stored, weight, grad_normed = host.dense(residual_out), host.dense(weight), host.stream(grad_normed)
    along = across = None
    if grad_normed is None:
        needs_norm = (False, False)
    else:
        along, across = norm_means(grad_normed, stored, weight, mean, rstd, kind)
    gradient = Gradient(host.stream(grad_residual), grad_normed, stored, weight, mean, rstd, along, across)
    one_gradient = on_sum and x_dtype == residual_dtype
    wanted = NormNeeds(residual_dtype if needs[7] and not one_gradient else None, *needs_norm, kind)
    need_hidden = needs[0] or (needs[7] and one_gradient)
    (d_hidden, *d_form), (d_residual, *d_norm) = form_backward(
        gradient, x, residual if on_sum else None, (scale, bias, read, offset, write, slot, coefficient),
        grad_z, z, (need_hidden, *needs[1:7]), x_dtype, on_sum, wanted,
    )  # fmt: skip
    if one_gradient:
        d_residual = d_hidden if needs[7] else None
    return d_hidden if needs[0] else None, d_residual, *d_form, *d_norm
