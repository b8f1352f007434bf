"""edit: h' = h + k · ((scale − 1) ⊙ h + bias + (h @ readᵀ + offset) @ write), in plain PyTorch.

The definition that every other backend is measured against. Rows are (rows, width);
arithmetic is fp32 (fp64 for fp64 rows) and rounds once, on the store.
"""

import torch

from .form import apply_form, compute_dtype, form_backward, gated_coefficient, row_coefficient


def edit(hidden, scale, bias, read, offset, write, slot, coefficient, want_z=False, gate=None, rule=None):
    """(h' in hidden's dtype, z fp32 (rows, rank) or None)."""
    h = hidden.to(compute_dtype(hidden))
    coefficient = gated_coefficient(h, gate, rule, slot, coefficient)
    out, z = apply_form(h, scale, bias, read, offset, write, slot, coefficient)
    out = out.to(hidden.dtype)
    k = row_coefficient(slot, coefficient, h.shape[0], h.dtype, h.device)
    if k is not None and h.dtype is not hidden.dtype:  # there and back, a NaN comes with other bits
        out = torch.where(k == 0, hidden, out)
    return (out.clone() if out is hidden else out), (z if want_z else None)


def edit_backward(
    grad, hidden, residual, scale, bias, read, offset, write, slot, coefficient, grad_z, z, needs, out_dtype
):
    """Seven gradients: hidden (out_dtype), scale, bias, read, offset, write, coefficient (fp32).

    `residual` is given by edit_add(on="sum"), where the edit saw hidden + residual.
    """
    dtype = compute_dtype(grad, hidden)
    h = None if hidden is None else hidden.to(dtype)
    if residual is not None and h is not None:
        h = h + residual.to(dtype)
    grad = None if grad is None else grad.to(dtype)
    d_h, *rest = form_backward(
        grad, h, scale, bias, read, offset, write, slot, coefficient,
        None if grad_z is None else grad_z.to(dtype), None if z is None else z.to(dtype), needs,
    )  # fmt: skip
    return (None if d_h is None else d_h.to(out_dtype), *rest)
