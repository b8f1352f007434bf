"""Forward kernels that own whole rows: edit and edit_add of rank above 0 or behind a gate, and every edit_add_norm.

    h' = h + k · ((scale − 1) ⊙ h + bias + z @ write),  z = h @ readᵀ + offset,  k = coefficient · gate (gate.py)
    residual' = residual + E(x) or E(residual + x),  normed = norm of the rounded residual'  (norm.py)

Streams: x [and residual] in, residual' [and normed] out, each once.
edit_rows_kernel: a program walks through row blocks with the rows in registers; scale, bias and the norm's
weight stay there too (without slots, up to HOIST_WIDTH columns), and the rank is taken one read and write
vector at a time, which needs no second pass; so is a gate's vector (kept, it would cost 154 registers instead of
128 with scale and bias on sm_90: one block a multiprocessor). edit_wide_kernel: for rows too wide for that, and for
larger ranks as tensor-core products: up to three passes over the row's tiles, of which the later ones hit L2; a
gate's sums are in the projection's.
Sums run along one row in an order fixed by width and rank, so a row's result depends on that row alone.
"""

import torch

import triton
import triton.language as tl

from . import host
from .device import (
    edit_input,
    edit_output,
    expand_tile,
    kernel,
    load_coefficient,
    load_parameter,
    load_ranks,
    load_rows,
    load_slot,
    project_tile,
    slot_base,
    store_ranks,
    store_rows,
)  # fmt: skip
from .gate import gated_coefficient
from .launch import HOIST_WIDTH, fits_rows, rank_block, rows_launch, uses_products, wide_launch
from .norm import normalised


@triton.jit
def low_rank_rows(h, read, offset, write, z, base, index, row, live, rank, width, cols, inside):
    """z @ write for whole rows, one rank at a time; stores z where wanted. None where there is no write."""
    added = tl.zeros(h.shape, tl.float32)
    for r in range(rank):
        first = (base * rank + r) * width
        z_r = tl.sum(h * load_parameter(read, first, cols, inside), axis=1)[:, None]
        if offset is not None:
            z_r += tl.load(offset + base * rank + r)
        if write is not None:
            added += z_r * load_parameter(write, first, cols, inside)
        if z is not None:
            if index is not None:
                z_r = tl.where((index < 0)[:, None], 0.0, z_r)
            tl.store(z + row.to(tl.int64)[:, None] * rank + r, z_r, mask=live[:, None])
    if write is None:
        return
    else:
        return added


@triton.jit
def norm_rows(
    value, mean, rstd, weight, norm_bias, row, live, width, inside, KIND: tl.constexpr, EPS: tl.constexpr
):
    """The norm of whole rows already rounded; stores its statistics where wanted."""
    r = value.to(tl.float32)
    centre = None
    centred = r
    if KIND == 2:
        centre = (tl.sum(r, axis=1) / width)[:, None]
        centred = tl.where(inside[None, :], r - centre, 0.0)
        if mean is not None:
            tl.store(mean + row[:, None], centre, mask=live[:, None])
    inverse = tl.rsqrt(tl.sum(centred * centred, axis=1) / width + EPS)[:, None]
    if rstd is not None:
        tl.store(rstd + row[:, None], inverse, mask=live[:, None])
    return normalised(r, centre, inverse, weight, norm_bias, KIND, value.dtype)


@kernel
def edit_rows_kernel(
    x, residual, out, normed, z, mean, rstd, weight, norm_bias,
    scale, bias, read, offset, write, slot, coefficient, gate, rule, slots, rank,
    rows, width, x_stride, residual_stride, steps,
    ON_SUM: tl.constexpr, SHARED_K: tl.constexpr, KIND: tl.constexpr, EPS: tl.constexpr, DTYPE: tl.constexpr,
    HOIST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_WIDTH)
    inside = cols < width
    kept_scale = load_parameter(scale if HOIST and slot is None else None, 0, cols, inside)
    kept_bias = load_parameter(bias if HOIST and slot is None else None, 0, cols, inside)
    kept_weight = load_parameter(weight if HOIST else None, 0, cols, inside)
    kept_norm_bias = load_parameter(norm_bias if HOIST else None, 0, cols, inside)
    first = tl.program_id(0) * steps * BLOCK_ROWS
    for step in range(steps):
        row = first + step * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        live = row < rows
        raw = load_rows(x, row, x_stride, live, cols, inside)
        added_to = load_rows(residual, row, residual_stride, live, cols, inside)
        index = load_slot(slot, row, live, slots)
        base = slot_base(index)
        k = load_coefficient(coefficient, index, row, live, SHARED_K)
        h = edit_input(raw, added_to, ON_SUM)
        if gate is not None:
            along = tl.sum(h * load_parameter(gate, base * width, cols, inside), axis=1)[:, None]
            k = gated_coefficient(k, along, tl.sum(h * h, axis=1)[:, None], rule, base)
        added = None
        if read is not None:
            added = low_rank_rows(
                h, read, offset, write, z, base, index, row, live, rank, width, cols, inside
            )
        if HOIST and slot is None:
            s = kept_scale
            b = kept_bias
        else:
            s = load_parameter(scale, base * width, cols, inside)
            b = load_parameter(bias, base * width, cols, inside)
        value = edit_output(h, raw, added_to, s, b, added, k, ON_SUM, DTYPE)
        if out is not None:
            store_rows(out, row, width, live, cols, inside, value)
        if normed is not None:
            if HOIST:
                w = kept_weight
                nb = kept_norm_bias
            else:
                w = load_parameter(weight, 0, cols, inside)
                nb = load_parameter(norm_bias, 0, cols, inside)
            y = norm_rows(value, mean, rstd, w, nb, row, live, width, inside, KIND, EPS)
            store_rows(normed, row, width, live, cols, inside, y)


@triton.jit
def project_rows(
    x, residual, x_stride, residual_stride, read, offset, gate, base, index, row, live, rank, width,
    ON_SUM: tl.constexpr, RANK_BLOCK: tl.constexpr, PRODUCTS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """z (BLOCK_ROWS, RANK_BLOCK), 0 for slot −1, and h · gate and h · h (BLOCK_ROWS, 1) of rows walked tile by tile."""
    z = tl.zeros((row.shape[0], RANK_BLOCK), tl.float32)
    along = tl.zeros((row.shape[0], 1), tl.float32)
    squares = tl.zeros((row.shape[0], 1), tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        cols = start + tl.arange(0, BLOCK_WIDTH)
        inside = cols < width
        h = edit_input(
            load_rows(x, row, x_stride, live, cols, inside),
            load_rows(residual, row, residual_stride, live, cols, inside), ON_SUM,
        )  # fmt: skip
        if read is not None:
            z = project_tile(z, h, read, base, rank, width, cols, inside, RANK_BLOCK, PRODUCTS)
        if gate is not None:
            along += tl.sum(h * load_parameter(gate, base * width, cols, inside), axis=1)[:, None]
            squares += tl.sum(h * h, axis=1)[:, None]
    if offset is not None:
        z += load_ranks(offset, base * rank, rank, True, RANK_BLOCK)
    if index is not None:
        z = tl.where((index < 0)[:, None], 0.0, z)
    return z, along, squares


@triton.jit
def wide_statistics(
    stored, row, live, width, KIND: tl.constexpr, EPS: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    """(mean, rstd) (BLOCK_ROWS, 1) of stored rows; the mean is 0 except for LAYER."""
    zero = tl.zeros((row.shape[0], BLOCK_WIDTH), tl.float32)
    mean = tl.zeros((row.shape[0], 1), tl.float32)
    if KIND == 2:
        total = zero
        for start in range(0, width, BLOCK_WIDTH):
            cols = start + tl.arange(0, BLOCK_WIDTH)
            total += load_rows(stored, row, width, live, cols, cols < width).to(tl.float32)
        mean = (tl.sum(total, axis=1) / width)[:, None]
    squares = zero
    for start in range(0, width, BLOCK_WIDTH):
        cols = start + tl.arange(0, BLOCK_WIDTH)
        inside = cols < width
        r = load_rows(stored, row, width, live, cols, inside).to(tl.float32)
        centred = tl.where(inside[None, :], r - mean, 0.0)
        squares += centred * centred
    return mean, tl.rsqrt(tl.sum(squares, axis=1) / width + EPS)[:, None]


@kernel
def edit_wide_kernel(
    x, residual, stored, normed, z, mean, rstd, weight, norm_bias,
    scale, bias, read, offset, write, slot, coefficient, gate, rule, slots, rank,
    rows, width, x_stride, residual_stride,
    ON_SUM: tl.constexpr, SHARED_K: tl.constexpr, KIND: tl.constexpr, EPS: tl.constexpr, DTYPE: tl.constexpr,
    RANK_BLOCK: tl.constexpr, PRODUCTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """`stored` holds residual' between the passes: the output, or normed itself where only that is wanted."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    live = row < rows
    index = load_slot(slot, row, live, slots)
    base = slot_base(index)
    k = load_coefficient(coefficient, index, row, live, SHARED_K)
    if read is not None or gate is not None:
        projected, along, squares = project_rows(
            x, residual, x_stride, residual_stride, read, offset, gate, base, index, row, live, rank, width,
            ON_SUM, RANK_BLOCK, PRODUCTS, BLOCK_WIDTH,
        )  # fmt: skip
        if gate is not None:
            k = gated_coefficient(k, along, squares, rule, base)
        if z is not None:
            store_ranks(z, row, rank, live, projected, RANK_BLOCK)
    for start in range(0, width, BLOCK_WIDTH):
        cols = start + tl.arange(0, BLOCK_WIDTH)
        inside = cols < width
        raw = load_rows(x, row, x_stride, live, cols, inside)
        added_to = load_rows(residual, row, residual_stride, live, cols, inside)
        h = edit_input(raw, added_to, ON_SUM)
        added = None
        if write is not None:
            added = expand_tile(projected, write, base, rank, width, cols, inside, RANK_BLOCK, PRODUCTS)
        s = load_parameter(scale, base * width, cols, inside)
        b = load_parameter(bias, base * width, cols, inside)
        value = edit_output(h, raw, added_to, s, b, added, k, ON_SUM, DTYPE)
        store_rows(stored, row, width, live, cols, inside, value)
    if normed is not None:
        tl.debug_barrier()  # the passes below read what other threads stored
        centre, inverse = wide_statistics(stored, row, live, width, KIND, EPS, BLOCK_WIDTH)
        if mean is not None:
            tl.store(mean + row[:, None], centre, mask=live[:, None])
        if rstd is not None:
            tl.store(rstd + row[:, None], inverse, mask=live[:, None])
        for start in range(0, width, BLOCK_WIDTH):
            cols = start + tl.arange(0, BLOCK_WIDTH)
            inside = cols < width
            r = load_rows(stored, row, width, live, cols, inside).to(tl.float32)
            w = load_parameter(weight, 0, cols, inside)
            nb = load_parameter(norm_bias, 0, cols, inside)
            y = normalised(r, centre, inverse, w, nb, KIND, DTYPE)
            store_rows(normed, row, width, live, cols, inside, y)


TRITON_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def run_rows(x, residual, out, form, rank, z, on_sum, norm=None):
    """Fill out, z and the norm's outputs, each or None.

    norm: (normed, mean, rstd, weight, norm_bias, kind, eps).
    """
    rows, width = x.shape
    normed, mean, rstd, weight, norm_bias, kind, eps = norm or (None, None, None, None, None, 0, 0.0)
    first = out if out is not None else normed
    if first.numel() == 0:
        return
    slotted = form[5] is not None
    sizes = (rows, width, x.stride(0), host.row_stride(residual))
    options = dict(
        ON_SUM=on_sum, SHARED_K=host.shared(form[6]), KIND=kind, EPS=eps, DTYPE=TRITON_DTYPE[first.dtype],
    )  # fmt: skip
    statistics = (z, mean, rstd, weight, norm_bias)
    if fits_rows(width, rank, slotted):
        shape = rows_launch(rows, width, host.warp_size())
        host.run(
            edit_rows_kernel, shape, x, x, residual, out, normed, *statistics, *form, *sizes, shape.steps,
            HOIST=width <= HOIST_WIDTH, BLOCK_ROWS=shape.block_rows, BLOCK_WIDTH=shape.block_width, **options,
        )  # fmt: skip
    else:
        shape = wide_launch(rows, width, rank, slotted, host.warp_size())
        host.run(
            edit_wide_kernel, shape, x, x, residual, first, normed, *statistics, *form, *sizes,
            RANK_BLOCK=rank_block(rank), PRODUCTS=uses_products(rank, slotted),
            BLOCK_ROWS=shape.block_rows, BLOCK_WIDTH=shape.block_width, **options,
        )  # fmt: skip
