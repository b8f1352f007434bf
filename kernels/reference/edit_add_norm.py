"""edit_add_norm: edit_add, then a norm of the stored (rounded) residual', in plain PyTorch.

    RMS    n̂ = r · rsqrt(mean(r²) + eps)
           normed = weight · round(n̂)                      Llama's order (norm RMS)
           normed = round(n̂ · (1 + weight))                Gemma's order (norm GEMMA)
    Layer  normed = round((r − mean(r)) · rstd · weight + norm_bias)   (norm LAYER)
"""

import torch

from .edit_add import edit_add
from .form import compute_dtype, form_backward

RMS, GEMMA, LAYER = 0, 1, 2


def edit_add_norm(
    x, residual, weight, norm_bias, scale, bias, read, offset, write, slot, coefficient,
    on_sum=False, kind=RMS, eps=1e-6, want_z=False, want_residual=True, want_stats=True, gate=None, rule=None,
):  # fmt: skip
    """(residual', normed, z or None, mean (rows,) or None, rstd (rows,)); mean only for LAYER.

    want_residual False and want_stats False return None in their places; the residual is still rounded
    before the norm.
    """
    form = (scale, bias, read, offset, write, slot, coefficient)
    out, z = edit_add(x, residual, *form, on_sum, want_z, gate, rule)
    normed, mean, rstd = norm(out, weight, norm_bias, kind, eps)
    if not want_stats:
        mean = rstd = None
    return (out if want_residual else None), normed, z, mean, rstd


def norm(rows, weight, norm_bias, kind, eps):
    """(normed in rows' dtype, mean or None, rstd) of the rounded rows."""
    r = rows.to(compute_dtype(rows))
    mean = r.mean(-1) if kind == LAYER else None
    centred = r if mean is None else r - mean[:, None]
    rstd = torch.rsqrt(centred.square().mean(-1) + eps)
    unit = centred * rstd[:, None]
    if kind == RMS:
        normed = (weight.to(r.dtype) * unit.to(rows.dtype).to(r.dtype)).to(rows.dtype)
    elif kind == GEMMA:
        normed = (unit * (1 + weight.to(r.dtype))).to(rows.dtype)
    else:
        normed = unit if weight is None else unit * weight.to(r.dtype)
        normed = (normed if norm_bias is None else normed + norm_bias.to(r.dtype)).to(rows.dtype)
    return normed, mean, rstd


def norm_backward(grad_normed, r, weight, mean, rstd, kind):
    """(d_r, d_weight (width,), d_norm_bias (width,)) in the compute dtype; roundings have gradient 1."""
    unit = (r if mean is None else r - mean[:, None]) * rstd[:, None]
    gain = 1.0 if weight is None else (1 + weight if kind == GEMMA else weight)
    g = grad_normed * gain
    inner = g - unit * (g * unit).mean(-1, keepdim=True)
    if kind == LAYER:
        inner = inner - g.mean(-1, keepdim=True)
    return inner * rstd[:, None], (grad_normed * unit).sum(0), grad_normed.sum(0)


def edit_add_norm_backward(
    grad_residual, grad_normed, residual_out, x, residual, weight, mean, rstd,
    scale, bias, read, offset, write, slot, coefficient, grad_z, z, on_sum, kind, needs, needs_norm,
    x_dtype, residual_dtype,
):  # fmt: skip
    """(d_x, d_residual, d_scale, d_bias, d_read, d_offset, d_write, d_coefficient, d_weight, d_norm_bias).

    grad_residual or grad_normed may be None. `residual` is given (with x) where on_sum and the edit's
    parameters need it, or x is the sum. needs: (x, scale, bias, read, offset, write, coefficient, residual);
    needs_norm: (weight, norm_bias).
    """
    dtype = compute_dtype(residual_out)
    total, d_weight, d_norm_bias = torch.zeros_like(residual_out, dtype=dtype), None, None
    if grad_normed is not None:
        total, d_weight, d_norm_bias = norm_backward(
            grad_normed.to(dtype), residual_out.to(dtype), None if weight is None else weight.to(dtype),
            mean, rstd, kind,
        )  # fmt: skip
    if grad_residual is not None:
        total = total + grad_residual.to(dtype)
    h = None if x is None else x.to(dtype)
    if on_sum and h is not None and residual is not None:
        h = h + residual.to(dtype)
    need_h = needs[0] or (on_sum and needs[7])
    d_h, *d_form = form_backward(
        total, h, scale, bias, read, offset, write, slot, coefficient,
        None if grad_z is None else grad_z.to(dtype), None if z is None else z.to(dtype),
        (need_h, *needs[1:7]),
    )  # fmt: skip
    d_x = d_h.to(x_dtype) if needs[0] else None
    d_residual = (d_h if on_sum else total).to(residual_dtype) if needs[7] else None
    return (
        d_x, d_residual, *d_form,
        d_weight if needs_norm[0] else None, d_norm_bias if needs_norm[1] else None,
    )  # fmt: skip
