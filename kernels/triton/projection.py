"""Projections of rows: z = k · (G @ matrixᵀ) + offset + addend, fp32 (rows, rank), 0 for slot −1.

G is hidden and the matrix read for `project`; G is the gradient and the matrix write for a backward's q.
Streams: G in (behind a norm, the three that form it), rows · rank out.
project_rows_kernel: whole rows in registers, one rank at a time; ranks up to MAX_VECTOR_RANK, or with slots.
project_tiles_kernel: 16 rows walked tile by tile as tensor-core products.
Either way a row's sums run in an order fixed by width and rank, so its z depends on that row alone.
"""

import torch

import triton.language as tl

from . import host
from .device import (
    kernel,
    load_coefficient,
    load_parameter,
    load_ranks,
    load_slot,
    project_tile,
    slot_base,
    store_ranks,
)  # fmt: skip
from .launch import fits_rows, rank_block, rows_launch, uses_products, wide_launch
from .norm import load_gradient, load_row_number


@kernel
def project_rows_kernel(
    grad, grad_normed, stored, weight, mean, rstd, along, across,
    matrix, offset, slot, coefficient, addend, z, slots, rank, rows, width, grad_stride, normed_stride,
    SHARED_K: tl.constexpr, KIND: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    live = row < rows
    cols = tl.arange(0, BLOCK_WIDTH)
    inside = cols < width
    index = load_slot(slot, row, live, slots)
    base = slot_base(index)
    k = load_coefficient(coefficient, index, row, live, SHARED_K)
    total = load_gradient(
        grad, grad_stride, grad_normed, normed_stride, stored, weight,
        load_row_number(mean, row, live), load_row_number(rstd, row, live),
        load_row_number(along, row, live), load_row_number(across, row, live),
        row, live, width, cols, inside, KIND,
    )  # fmt: skip
    for r in range(rank):
        z_r = tl.sum(total * load_parameter(matrix, (base * rank + r) * width, cols, inside), axis=1)[:, None]
        if k is not None:
            z_r = k * z_r
        if offset is not None:
            z_r += tl.load(offset + base * rank + r)
        at = row.to(tl.int64)[:, None] * rank + r
        if addend is not None:
            z_r += tl.load(addend + at, mask=live[:, None], other=0.0)
        if index is not None:
            z_r = tl.where((index < 0)[:, None], 0.0, z_r)
        tl.store(z + at, z_r, mask=live[:, None])


@kernel
def project_tiles_kernel(
    grad, grad_normed, stored, weight, mean, rstd, along, across,
    matrix, offset, slot, coefficient, addend, z, slots, rank, rows, width, grad_stride, normed_stride,
    SHARED_K: tl.constexpr, KIND: tl.constexpr,
    RANK_BLOCK: tl.constexpr, PRODUCTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    live = row < rows
    index = load_slot(slot, row, live, slots)
    base = slot_base(index)
    k = load_coefficient(coefficient, index, row, live, SHARED_K)
    centre = load_row_number(mean, row, live)
    inverse = load_row_number(rstd, row, live)
    mean_along = load_row_number(along, row, live)
    mean_across = load_row_number(across, row, live)
    sums = tl.zeros((BLOCK_ROWS, RANK_BLOCK), tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        cols = start + tl.arange(0, BLOCK_WIDTH)
        inside = cols < width
        total = load_gradient(
            grad, grad_stride, grad_normed, normed_stride, stored, weight,
            centre, inverse, mean_along, mean_across, row, live, width, cols, inside, KIND,
        )  # fmt: skip
        sums = project_tile(sums, total, matrix, base, rank, width, cols, inside, RANK_BLOCK, PRODUCTS)
    if k is not None:
        sums = k * sums
    if offset is not None:
        sums += load_ranks(offset, base * rank, rank, True, RANK_BLOCK)
    if addend is not None:
        sums += load_ranks(addend, row.to(tl.int64)[:, None] * rank, rank, live[:, None], RANK_BLOCK)
    if index is not None:
        sums = tl.where((index < 0)[:, None], 0.0, sums)
    store_ranks(z, row, rank, live, sums, RANK_BLOCK)


def run_projection(gradient, strides, matrix, offset, slot, coefficient, addend, sizes, kind=0):
    """z (rows, rank). gradient, strides: of norm.load_gradient; sizes: rows, width, rank and slots."""
    rows, width, rank, slots = sizes
    slotted = slot is not None
    z = torch.empty((rows, rank), dtype=torch.float32, device=matrix.device)
    args = (*gradient, matrix, offset, slot, coefficient, addend, z, slots, rank, rows, width, *strides)
    options = dict(SHARED_K=host.shared(coefficient), KIND=kind)
    if fits_rows(width, rank, slotted):
        kernel, shape = project_rows_kernel, rows_launch(rows, width, host.warp_size(), steps=1)
    else:
        kernel, shape = project_tiles_kernel, wide_launch(rows, width, rank, slotted, host.warp_size())
        options |= dict(RANK_BLOCK=rank_block(rank), PRODUCTS=uses_products(rank, slotted))
    if z.numel():
        blocks = dict(BLOCK_ROWS=shape.block_rows, BLOCK_WIDTH=shape.block_width)
        host.run(kernel, shape, matrix, *args, **blocks, **options)
    return z
