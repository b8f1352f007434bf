"""edit_add: residual' = residual + E(x) (on_sum False) or E(residual + x) (on_sum True), in plain PyTorch.

Dtypes promote as PyTorch's add does; the sum is formed in fp32 and rounds once, on the store.
"""

import torch

from .edit import edit_backward
from .form import apply_form, compute_dtype


def edit_add(x, residual, scale, bias, read, offset, write, slot, coefficient, on_sum=False, want_z=False):
    """(residual' in the promoted dtype, z fp32 (rows, rank) or None)."""
    dtype = compute_dtype(x, residual)
    out_dtype = torch.promote_types(x.dtype, residual.dtype)
    form = (scale, bias, read, offset, write, slot, coefficient)
    if on_sum:
        out, z = apply_form(residual.to(dtype) + x.to(dtype), *form)
    else:
        edited, z = apply_form(x.to(dtype), *form)
        out = residual.to(dtype) + edited
    return out.to(out_dtype), (z if want_z else None)


edit_add_backward = edit_backward  # d_residual is grad itself (on x) or d_x (on the sum)
