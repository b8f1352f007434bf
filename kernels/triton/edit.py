"""edit: h' = h + k · ((scale − 1) ⊙ h + bias + (h @ readᵀ + offset) @ write).

Streams: hidden in, h' out (the kernel also serves edit_add, which reads x and residual).
Rank 0, here: a grid of column tiles × row groups; scale and bias of a tile stay in registers across the rows
of its group (where rows carry slots they are loaded per row, and repeated slots hit L1). Nothing is summed,
so a row's result depends on that row alone. Rank above 0 and a gate need sums along the row: rows.py.
Backward: backward.py.
"""

import torch

import triton.language as tl

from . import host
from .backward import Gradient, form_backward
from .device import (
    edit_input,
    edit_output,
    kernel,
    load_coefficient,
    load_parameter,
    load_rows,
    load_slot,
    slot_base,
    store_rows,
)  # fmt: skip
from .launch import tile_launch
from .rows import run_rows


@kernel
def edit_kernel(
    x, residual, out, scale, bias, slot, coefficient, slots,
    rows, width, x_stride, residual_stride, steps,
    ON_SUM: tl.constexpr, SHARED_K: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(width, BLOCK_WIDTH)
    pid = tl.program_id(0)
    cols = (pid % tiles) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = cols < width
    kept_scale = load_parameter(scale if slot is None else None, 0, cols, inside)
    kept_bias = load_parameter(bias if slot is None else None, 0, cols, inside)
    first = (pid // tiles) * steps * BLOCK_ROWS
    for step in range(steps):
        row = first + step * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        live = row < rows
        raw = load_rows(x, row, x_stride, live, cols, inside)
        added_to = load_rows(residual, row, residual_stride, live, cols, inside)
        index = load_slot(slot, row, live, slots)
        k = load_coefficient(coefficient, index, row, live, SHARED_K)
        if slot is None:
            s = kept_scale
            b = kept_bias
        else:
            s = load_parameter(scale, slot_base(index) * width, cols, inside)
            b = load_parameter(bias, slot_base(index) * width, cols, inside)
        h = edit_input(raw, added_to, ON_SUM)
        value = edit_output(h, raw, added_to, s, b, None, k, ON_SUM, out.dtype.element_ty)
        store_rows(out, row, width, live, cols, inside, value)


def run_edit(x, residual, form, on_sum, want_z):
    """(out, z or None) of edit (residual None) and edit_add; form: scale to coefficient, gate, rule."""
    rows, width = x.shape
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    out = torch.empty((rows, width), dtype=dtype, device=x.device)
    form, rank = host.kernel_form(*form, want_z)
    z = host.empty_z(x, rank, want_z)
    x, residual = host.stream(x), host.stream(residual)
    if rank or form[7] is not None:
        run_rows(x, residual, out, form, rank, z, on_sum)
    elif out.numel():
        scale, bias, _, _, _, slot, coefficient, _, _, slots, _ = form
        shape = tile_launch(rows, width, host.warp_size())
        host.run(
            edit_kernel, shape, x, x, residual, out, scale, bias, slot, coefficient, slots,
            rows, width, x.stride(0), host.row_stride(residual), shape.steps,
            ON_SUM=on_sum, SHARED_K=host.shared(coefficient),
            BLOCK_ROWS=shape.block_rows, BLOCK_WIDTH=shape.block_width,
        )  # fmt: skip
    return out, z


def edit(hidden, scale, bias, read, offset, write, slot, coefficient, want_z=False, gate=None, rule=None):
    """(h' in hidden's dtype, z fp32 (rows, rank) or None)."""
    form = (scale, bias, read, offset, write, slot, coefficient, gate, rule)
    return run_edit(hidden, None, form, False, want_z)


def edit_backward(
    grad, hidden, residual, scale, bias, read, offset, write, slot, coefficient, grad_z, z, needs, out_dtype
):
    """Seven gradients: hidden (out_dtype), scale, bias, read, offset, write, coefficient (fp32).

    `residual` is given by edit_add(on="sum"), where the edit saw hidden + residual.
    """
    form = (scale, bias, read, offset, write, slot, coefficient)
    on_sum = residual is not None and hidden is not None
    gradient = Gradient(host.stream(grad))
    grads, _ = form_backward(gradient, hidden, residual, form, grad_z, z, needs, out_dtype, on_sum)
    return tuple(grads)
