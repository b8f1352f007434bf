"""The norm on tiles: its output, what flows back through it, and the row means that its backward needs.

    RMS    n̂ = r · rstd                 normed = weight · round(n̂)             (KIND 0, Llama's order)
           n̂ = r · rstd                 normed = round(n̂ · (1 + weight))       (KIND 1, Gemma's order)
    Layer  n̂ = (r − mean) · rstd        normed = round(n̂ · weight + norm_bias) (KIND 2)
    G = grad_residual + rstd · (g − n̂ · mean(g ⊙ n̂) − [Layer] mean(g)),  g = grad_normed ⊙ gain

norm_means_kernel: grad_normed and residual' in, two numbers per row out; a program walks a few rows tile by
tile, and a row's sums run in an order fixed by the width.
"""

import torch

import triton
import triton.language as tl

from . import host
from .device import kernel, load_parameter, load_rows, narrow
from .launch import statistics_launch

RMS, GEMMA, LAYER = 0, 1, 2


@triton.jit
def norm_gain(weight, KIND: tl.constexpr):
    """What a norm multiplies the unit row by: weight, 1 + weight (GEMMA), or None for 1."""
    if weight is None:
        return
    else:
        if KIND == 1:
            return 1.0 + weight
        else:
            return weight


@triton.jit
def normalised(r, mean, rstd, weight, norm_bias, KIND: tl.constexpr, dtype: tl.constexpr):
    """The norm's output in the kind's order of roundings, for rows of known statistics (BLOCK_ROWS, 1)."""
    unit = r * rstd if mean is None else (r - mean) * rstd
    if KIND == 0:
        return narrow(weight * narrow(unit, dtype).to(tl.float32), dtype)
    else:
        gain = norm_gain(weight, KIND)
        y = unit if gain is None else unit * gain
        if norm_bias is not None:
            y = y + norm_bias
        return narrow(y, dtype)


@triton.jit
def load_row_number(pointer, row, live):
    """(BLOCK_ROWS, 1) fp32 of one number per row; None where absent."""
    if pointer is None:
        return
    else:
        return tl.load(pointer + row, mask=live, other=0.0)[:, None]


@triton.jit
def load_unit(stored, mean, rstd, row, live, width, cols, inside):
    """The normalised row before its weight, 0 outside; mean (or None) and rstd are (BLOCK_ROWS, 1) values."""
    r = load_rows(stored, row, width, live, cols, inside).to(tl.float32)
    if mean is not None:
        r = tl.where(inside[None, :], r - mean, 0.0)
    return r * rstd


@triton.jit
def load_gradient(
    grad, grad_stride, grad_normed, normed_stride, stored, weight, mean, rstd, along, across,
    row, live, width, cols, inside, KIND: tl.constexpr,
):  # fmt: skip
    """G: grad, plus what flows back through the norm; 0 where both are absent. along = mean(g ⊙ n̂) and
    across = mean(g) are, like mean and rstd, (BLOCK_ROWS, 1) values."""
    total = tl.zeros((row.shape[0], cols.shape[0]), tl.float32)
    if grad_normed is not None:
        g = load_rows(grad_normed, row, normed_stride, live, cols, inside).to(tl.float32)
        gain = norm_gain(load_parameter(weight, 0, cols, inside), KIND)
        if gain is not None:
            g = g * gain
        total = g - load_unit(stored, mean, rstd, row, live, width, cols, inside) * along
        if KIND == 2:
            total = total - across
        total = total * rstd
    if grad is not None:
        total += load_rows(grad, row, grad_stride, live, cols, inside).to(tl.float32)
    return total


@kernel
def norm_means_kernel(
    grad_normed, stored, weight, mean, rstd, along, across, rows, width, normed_stride,
    KIND: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """along = mean(g ⊙ n̂) and, for LAYER, across = mean(g) of each row."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    live = row < rows
    centre = load_row_number(mean, row, live)
    inverse = load_row_number(rstd, row, live)
    along_sum = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
    across_sum = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        cols = start + tl.arange(0, BLOCK_WIDTH)
        inside = cols < width
        g = load_rows(grad_normed, row, normed_stride, live, cols, inside).to(tl.float32)
        gain = norm_gain(load_parameter(weight, 0, cols, inside), KIND)
        if gain is not None:
            g = g * gain
        along_sum += g * load_unit(stored, centre, inverse, row, live, width, cols, inside)
        across_sum += g
    tl.store(along + row, tl.sum(along_sum, axis=1) / width, mask=live)
    if across is not None:
        tl.store(across + row, tl.sum(across_sum, axis=1) / width, mask=live)


def norm_means(grad_normed, stored, weight, mean, rstd, kind):
    """(along, across or None), fp32 (rows,)."""
    rows, width = stored.shape
    along = torch.empty(rows, dtype=torch.float32, device=stored.device)
    across = torch.empty_like(along) if kind == LAYER else None
    if stored.numel():
        shape = statistics_launch(rows, width, host.warp_size())
        host.run(
            norm_means_kernel, shape, stored, grad_normed, stored, weight, mean, rstd, along, across,
            rows, width, grad_normed.stride(0),
            KIND=kind, BLOCK_ROWS=shape.block_rows, BLOCK_WIDTH=shape.block_width,
        )  # fmt: skip
    return along, across
