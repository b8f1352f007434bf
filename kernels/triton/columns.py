"""Backward of every op, column by column. With k the coefficient (0 for slot −1), G the gradient of h' and
q = k (G @ writeᵀ) + dL/dz:

    d_hidden = G + k (scale − 1) ⊙ G + q @ read
    scale Σ k G⊙h   bias Σ k G   read qᵀh   offset Σ q   write (k z)ᵀ G
    coefficient Σ_width G ⊙ ((scale − 1) ⊙ h + bias + z @ write)

Streams: G and h in, d_hidden out, once each; rank above 0 reads G once more before (projection.py), since q
needs whole rows. Behind a norm, G = grad_residual + norm'(grad_normed) (norm.py), formed again from its
streams wherever it is needed, never stored.
Grid: column tiles × blocks of 256 rows; scale, bias, read and write of the tile and all its column sums stay
on chip across the block. With slots, rows are sorted by slot and a block's rows share one. A block's sums go
to an fp32 workspace that reduce.py adds as a fixed tree: deterministic, no atomics. d_coefficient is summed
over column tiles by the same tree.
"""

import triton
import triton.language as tl

from .device import (
    FP32_PRODUCT,
    edit_input,
    kernel,
    load_coefficient,
    load_parameter,
    load_ranks,
    load_rows,
    narrow,
    row_product,
    store_rows,
)  # fmt: skip
from .norm import load_gradient, load_row_number, load_unit


@triton.jit
def load_input(x, residual, x_stride, residual_stride, row, live, cols, inside, ON_SUM: tl.constexpr):
    """h, fp32; None where no wanted gradient reads it. Without a residual x is the sum itself: the edit's output, from which
    d_read is recovered (ops/autograd.py)."""
    if x is None:
        return
    else:
        return edit_input(
            load_rows(x, row, x_stride, live, cols, inside),
            load_rows(residual, row, residual_stride, live, cols, inside), ON_SUM and residual is not None,
        )  # fmt: skip


@triton.jit
def load_matrix(pointer, owner, rank, width, cols, inside, RANK_BLOCK: tl.constexpr):
    """(RANK_BLOCK, BLOCK_WIDTH) of one slot's read or write; None where absent."""
    if pointer is None:
        return
    else:
        ranks = tl.arange(0, RANK_BLOCK)
        at = pointer + owner * rank * width + ranks[:, None] * width + cols[None, :]
        return tl.load(at, mask=(ranks < rank)[:, None] & inside[None, :], other=0.0)


@triton.jit
def store_matrix(pointer, block, columns, sums, rank, width, cols, inside, RANK_BLOCK: tl.constexpr):
    ranks = tl.arange(0, RANK_BLOCK)
    at = pointer + block.to(tl.int64) * columns + ranks[:, None] * width + cols[None, :]
    tl.store(at, sums, mask=(ranks < rank)[:, None] & inside[None, :])


@triton.jit
def store_sums(pointer, block, columns, sums, cols, inside):
    tl.store(pointer + block.to(tl.int64) * columns + cols, tl.sum(sums, axis=0), mask=inside)


@triton.jit
def load_row_ranks(pointer, row, rank, live, RANK_BLOCK: tl.constexpr):
    """(BLOCK_ROWS, RANK_BLOCK) of q or z; None where absent."""
    if pointer is None:
        return
    else:
        return load_ranks(pointer, row.to(tl.int64)[:, None] * rank, rank, live[:, None], RANK_BLOCK)


@triton.jit
def block_rows_of(table, block, rows, BLOCK: tl.constexpr):
    """(slot, first position, last position + 1) of a block of rows; slot 0 without slots."""
    if table is None:
        return 0, block * BLOCK, tl.minimum(block * BLOCK + BLOCK, rows)
    else:
        return tl.load(table + block * 3), tl.load(table + block * 3 + 1), tl.load(table + block * 3 + 2)


@triton.jit
def block_coefficient(coefficient, slot, slotted: tl.constexpr, row, live, SHARED_K: tl.constexpr):
    """The rows' k in a block of one slot: (BLOCK_ROWS, 1), a number, or None where it is 1."""
    k = load_coefficient(coefficient, None, row, live, SHARED_K)
    if not slotted:
        return k
    else:
        if k is None:
            return tl.where(slot < 0, 0.0, 1.0)
        else:
            return tl.where(slot < 0, 0.0, k)


@triton.jit
def hidden_gradient(total, kg, k, s, q, read):
    """dL/dh of one tile: G + k (scale − 1) ⊙ G + q @ read, or scale ⊙ G + q @ read where k is None."""
    d_h = total
    if s is not None:
        d_h = s * total if k is None else total + (s - 1.0) * kg
    if q is not None and read is not None:
        d_h += row_product(q, read)
    return d_h


@triton.jit
def coefficient_gradient(total, h, s, b, z, write):
    """(BLOCK_ROWS,) this tile's share of Σ_width G ⊙ ((scale − 1) ⊙ h + bias + z @ write)."""
    update = tl.zeros(total.shape, tl.float32)
    if s is not None:
        update += (s - 1.0) * h
    if b is not None:
        update += b
    if write is not None:
        update += tl.dot(z, write, input_precision=FP32_PRODUCT)
    return tl.sum(total * update, axis=1)


@kernel
def columns_kernel(
    grad, grad_normed, stored, weight, mean, rstd, along, across, x, residual,
    scale, bias, read, write, coefficient, q, z, order, table, rank,
    d_hidden, d_residual, d_coefficient,
    p_scale, p_bias, p_read, p_write, p_offset, p_weight, p_norm_bias, columns,
    rows, width, grad_stride, normed_stride, x_stride, residual_stride,
    ON_SUM: tl.constexpr, SHARED_K: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
    RANK_BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """One block of BLOCK rows, one tile of columns. d_residual is G where the edit is on x, dL/dh on the sum;
    d_coefficient (tiles, rows) takes sums over this tile's columns, p_… this block's column sums."""
    tiles = tl.cdiv(width, BLOCK_WIDTH)
    block = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    cols = tile * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = cols < width
    slot, begin, end = block_rows_of(table, block, rows, BLOCK)
    base = 0 if table is None else tl.maximum(slot, 0).to(tl.int64)
    s = load_parameter(scale, base * width, cols, inside)
    b = load_parameter(bias, base * width, cols, inside)
    read_tile = load_matrix(read, base, rank, width, cols, inside, RANK_BLOCK)
    write_tile = load_matrix(write, base, rank, width, cols, inside, RANK_BLOCK)
    sum_scale = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
    sum_bias = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
    sum_weight = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
    sum_norm_bias = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
    sum_read = tl.zeros((RANK_BLOCK, BLOCK_WIDTH), tl.float32)
    sum_write = tl.zeros((RANK_BLOCK, BLOCK_WIDTH), tl.float32)
    sum_offset = tl.zeros((BLOCK_ROWS, RANK_BLOCK), tl.float32)
    for start in range(begin, end, BLOCK_ROWS):
        position = start + tl.arange(0, BLOCK_ROWS)
        live = position < end
        row = position if order is None else tl.load(order + position, mask=live, other=0)
        k = block_coefficient(coefficient, slot, table is not None, row, live, SHARED_K)
        centre = load_row_number(mean, row, live)
        inverse = load_row_number(rstd, row, live)
        total = load_gradient(
            grad, grad_stride, grad_normed, normed_stride, stored, weight, centre, inverse,
            load_row_number(along, row, live), load_row_number(across, row, live),
            row, live, width, cols, inside, KIND,
        )  # fmt: skip
        kg = total if k is None else k * total
        h = load_input(x, residual, x_stride, residual_stride, row, live, cols, inside, ON_SUM)
        q_tile = load_row_ranks(q, row, rank, live, RANK_BLOCK)
        z_tile = load_row_ranks(z, row, rank, live, RANK_BLOCK)
        d_h = hidden_gradient(total, kg, k, s, q_tile, read_tile)
        if d_hidden is not None:
            store_rows(d_hidden, row, width, live, cols, inside, narrow(d_h, d_hidden.dtype.element_ty))
        if d_residual is not None:
            d_r = d_h if ON_SUM else total
            store_rows(d_residual, row, width, live, cols, inside, narrow(d_r, d_residual.dtype.element_ty))
        if d_coefficient is not None:
            d_k = coefficient_gradient(total, h, s, b, z_tile, write_tile)
            if table is not None:
                d_k = tl.where(slot < 0, 0.0, d_k)
            tl.store(d_coefficient + tile.to(tl.int64) * rows + row, d_k, mask=live)
        if p_scale is not None:
            sum_scale += kg * h
        if p_bias is not None:
            sum_bias += kg
        if p_read is not None:
            sum_read += tl.dot(tl.trans(q_tile), h, input_precision=FP32_PRODUCT)
        if p_offset is not None:
            sum_offset += q_tile
        if p_write is not None:
            sum_write += tl.dot(tl.trans(z_tile), kg, input_precision=FP32_PRODUCT)
        if p_weight is not None or p_norm_bias is not None:
            gn = load_rows(grad_normed, row, normed_stride, live, cols, inside).to(tl.float32)
            sum_norm_bias += gn
            if p_weight is not None:
                sum_weight += gn * load_unit(stored, centre, inverse, row, live, width, cols, inside)
    if p_scale is not None:
        store_sums(p_scale, block, columns, sum_scale, cols, inside)
    if p_bias is not None:
        store_sums(p_bias, block, columns, sum_bias, cols, inside)
    if p_read is not None:
        store_matrix(p_read, block, columns, sum_read, rank, width, cols, inside, RANK_BLOCK)
    if p_write is not None:
        store_matrix(p_write, block, columns, sum_write, rank, width, cols, inside, RANK_BLOCK)
    if p_weight is not None:
        store_sums(p_weight, block, columns, sum_weight, cols, inside)
    if p_norm_bias is not None:
        store_sums(p_norm_bias, block, columns, sum_norm_bias, cols, inside)
    if p_offset is not None:
        ranks = tl.arange(0, RANK_BLOCK)
        store_sums(p_offset, block, columns, sum_offset, ranks, ranks < tl.where(tile == 0, rank, 0))
