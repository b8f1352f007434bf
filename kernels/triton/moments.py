"""moments: count, mean and M2 = Σ (h − mean)² of each group's rows, a column at a time, in one pass.

Streams: hidden in. Partials: three floats a column of a block of 256 rows of a group.
Grid: column tiles × blocks, then column tiles × groups. A block sums d and d² in fp32, d = h − the mean of its first
rows, so that nothing cancels; blocks are merged in row order by Chan's formula, mean and M2 each as an unevaluated sum
of two floats. No order depends on anything but a row's place in its group.
"""

import torch

import triton
import triton.language as tl

from ..reference.slot_order import slot_order
from . import host
from .device import kernel, load_rows
from .launch import PARTIAL_ROWS, Launch, cdiv, column_tile, warps


@triton.jit
def two_sum(a, b):
    """(a + b rounded, what the rounding lost)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


@triton.jit
def add_exact(high, low, value):
    """high + low + value as such a pair."""
    total, lost = two_sum(high, value)
    return two_sum(total, low + lost)


@kernel
def moment_sums_kernel(
    x, order, begins, ends, partials, rows, width, x_stride,
    PARTIAL: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(width, BLOCK_WIDTH)
    block = tl.program_id(0) // tiles
    cols = (tl.program_id(0) % tiles) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = cols < width
    if order is None:
        begin = block * PARTIAL
        end = tl.minimum(begin + PARTIAL, rows)
    else:
        begin = tl.load(begins + block)
        end = tl.load(ends + block)
    lanes = tl.arange(0, BLOCK_ROWS)
    shift = tl.zeros((BLOCK_WIDTH,), tl.float32)
    total = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
    squares = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
    for start in range(begin, end, BLOCK_ROWS):
        at = start + lanes
        live = at < end
        if order is None:
            row = at
        else:
            row = tl.load(order + at, mask=live, other=0)
        h = load_rows(x, row, x_stride, live, cols, inside).to(tl.float32)
        if start == begin:
            shift = tl.sum(h, axis=0) / tl.minimum(end - begin, BLOCK_ROWS).to(tl.float32)
        d = tl.where(live[:, None], h - shift[None, :], 0.0)
        total += d
        squares += d * d
    out = partials + block.to(tl.int64) * 3 * width + cols
    tl.store(out, shift, mask=inside)
    tl.store(out + width, tl.sum(total, axis=0), mask=inside)
    tl.store(out + 2 * width, tl.sum(squares, axis=0), mask=inside)


@kernel
def moment_merge_kernel(
    partials, first, block_first, mean, m2, rows, width, groups, PARTIAL: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    tiles = tl.cdiv(width, BLOCK_WIDTH)
    group = tl.program_id(0) // tiles
    cols = (tl.program_id(0) % tiles) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = cols < width
    begin = 0
    count = rows
    if first is not None:
        begin = tl.load(block_first + group)
        count = tl.load(first + group + 1) - tl.load(first + group)
    begin64 = group.to(tl.int64) * 0 + begin
    high = tl.zeros((BLOCK_WIDTH,), tl.float32)
    low = tl.zeros((BLOCK_WIDTH,), tl.float32)
    m2_high = tl.zeros((BLOCK_WIDTH,), tl.float32)
    m2_low = tl.zeros((BLOCK_WIDTH,), tl.float32)
    for block in range(tl.cdiv(count, PARTIAL)):
        at = partials + (begin64 + block) * 3 * width + cols
        before = block * (PARTIAL * 1.0)
        size = tl.minimum(count - block * PARTIAL, PARTIAL).to(tl.float32)
        shift = tl.load(at, mask=inside, other=0.0)
        total = tl.load(at + width, mask=inside, other=0.0)
        squares = tl.load(at + 2 * width, mask=inside, other=0.0)
        shifted = total / size
        left = squares - total * shifted
        left = tl.where(left < 0.0, 0.0, left)
        if block == 0:
            high, low = two_sum(shift, shifted)
        else:
            delta = (shift - high) + (shifted - low)
            share = size / (before + size)
            high, low = add_exact(high, low, delta * share)
            m2_high, m2_low = add_exact(m2_high, m2_low, delta * delta * (before * share))
        m2_high, m2_low = add_exact(m2_high, m2_low, left)
    out = group.to(tl.int64) * width + cols
    second = groups * width
    tl.store(mean + out, high, mask=inside)
    tl.store(mean + second + out, low, mask=inside)
    tl.store(m2 + out, m2_high, mask=inside)
    tl.store(m2 + second + out, m2_low, mask=inside)


def block_rows(order, first, block_first, rows):
    """(begin, end) of each block's rows in `order`, int32; as many blocks as (rows, groups) can need, empty at the end."""
    groups = len(first) - 1
    block = torch.arange(cdiv(rows, PARTIAL_ROWS) + min(groups, rows), device=order.device, dtype=torch.int32)
    group = torch.searchsorted(block_first[1:], block, right=True).clamp_max(groups - 1)
    begin = first[group] + (block - block_first[group]) * PARTIAL_ROWS
    end = torch.minimum(begin + PARTIAL_ROWS, first[group + 1])
    return begin.to(torch.int32), torch.maximum(begin, end).to(torch.int32)


def sums_launch(blocks, width, warp_size=32):
    """16 rows at a time and, like a backward's column sums, tiles narrow enough for many programs."""
    block_width = column_tile(width, 128, 64)
    return Launch(16, block_width, warps(16 * block_width, 16, warp_size), 1, blocks * cdiv(width, block_width))


def moments(hidden, group, groups):
    """(count (groups,) int64, mean (groups, width) float64, m2 likewise); see the reference."""
    hidden, (rows, width), device = host.stream(hidden), hidden.shape, hidden.device
    order = first = block_first = begins = ends = None
    blocks = cdiv(rows, PARTIAL_ROWS)
    count = torch.full((1,), rows, dtype=torch.int64, device=device)
    if group is not None:
        order, first, block_first = slot_order(group, groups)
        begins, ends = block_rows(order, first, block_first, rows)
        blocks, count = len(begins), first.diff().to(torch.int64)
    partials = torch.empty((blocks, 3, width), dtype=torch.float32, device=device)
    pairs = torch.empty((2, 2, groups, width), dtype=torch.float32, device=device)  # mean, m2: high parts, low parts
    shape = sums_launch(blocks, width, host.warp_size())
    host.run(
        moment_sums_kernel, shape, hidden, hidden, order, begins, ends, partials, rows, width, hidden.stride(0),
        PARTIAL=PARTIAL_ROWS, BLOCK_ROWS=shape.block_rows, BLOCK_WIDTH=shape.block_width,
    )  # fmt: skip
    merge = Launch(1, 128, 128 // host.warp_size(), 1, groups * cdiv(width, 128))
    host.run(
        moment_merge_kernel, merge, hidden, partials, first, block_first, pairs[0], pairs[1], rows, width, groups,
        PARTIAL=PARTIAL_ROWS, BLOCK_WIDTH=128,
    )  # fmt: skip
    wide = pairs.double()
    return count, wide[0, 0] + wide[0, 1], wide[1, 0] + wide[1, 1]
