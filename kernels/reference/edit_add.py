"""edit_add: residual' = residual + E(x) (on_sum False) or E(residual + x) (on_sum True), in plain PyTorch.

Dtypes promote as PyTorch's add does; the sum is formed in fp32 and rounds once, on the store.
"""

import torch

from .edit import edit_backward
from .form import apply_form, compute_dtype, gated_coefficient


def edit_add(
    x, residual, scale, bias, read, offset, write, slot, coefficient, on_sum=False, want_z=False, gate=None, rule=None
):  # fmt: skip
    """(residual' in the promoted dtype, z fp32 (rows, rank) or None)."""
    dtype = compute_dtype(x, residual)
    out_dtype = torch.promote_types(x.dtype, residual.dtype)
    h = residual.to(dtype) + x.to(dtype) if on_sum else x.to(dtype)
    coefficient = gated_coefficient(h, gate, rule, slot, coefficient)
    out, z = apply_form(h, scale, bias, read, offset, write, slot, coefficient)
    if not on_sum:
        out = residual.to(dtype) + out
    return out.to(out_dtype), (z if want_z else None)


edit_add_backward = edit_backward  # d_residual is grad itself (on x) or d_x (on the sum)
