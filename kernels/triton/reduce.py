"""Column sums over blocks of rows: the tree that adds the fp32 partials, and where each block's rows are.

    sums[s] = Σ partials[first[s] … first[s+1])     (segments, columns) from (blocks, columns)

Partials are read once. Grid: segments × column tiles. 16 partials are loaded at a time and added pairwise;
the sums of such chunks are added as a binary counter carries, which is the pairwise tree over blocks padded
with zeros to a power of two. Its shape depends on the number of blocks alone: deterministic, no atomics.
"""

import torch

import triton
import triton.language as tl

from ..reference.slot_order import slot_order
from . import host
from .device import kernel
from .launch import PARTIAL_ROWS, cdiv, reduce_launch


@triton.jit
def pairwise(x):
    """(BLOCK_WIDTH,) sum over the first dimension of x, a power of two, neighbours first."""
    if x.shape[0] == 1:
        return tl.reshape(x, (x.shape[1],))
    else:
        return pairwise(tl.sum(tl.reshape(x, (x.shape[0] // 2, 2, x.shape[1])), axis=1))


@kernel
def reduce_kernel(
    partials, sums, first, count, columns, stride, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    tiles = tl.cdiv(columns, BLOCK_WIDTH)
    segment = tl.program_id(0) // tiles
    cols = (tl.program_id(0) % tiles) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = cols < columns
    begin = 0
    end = count
    if first is not None:
        begin = tl.load(first + segment)
        end = tl.load(first + segment + 1)
    lanes = tl.arange(0, BLOCK_ROWS)
    carried = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)  # row l: the sum of 2^l whole chunks
    chunks = tl.cdiv(end - begin, BLOCK_ROWS)
    for chunk in range(chunks):
        block = begin + chunk * BLOCK_ROWS + lanes
        at = partials + block.to(tl.int64)[:, None] * stride + cols[None, :]
        value = pairwise(tl.load(at, mask=(block < end)[:, None] & inside[None, :], other=0.0))
        level = 0
        while ((chunk >> level) & 1) == 1:
            value = tl.sum(tl.where(lanes[:, None] == level, carried, 0.0), axis=0) + value
            level += 1
        carried = tl.where(lanes[:, None] == level, value[None, :], carried)
    total = tl.zeros((BLOCK_WIDTH,), tl.float32)
    level = 0
    while (chunks >> level) > 0:
        part = tl.sum(tl.where(lanes[:, None] == level, carried, 0.0), axis=0)
        total = tl.where(((chunks >> level) & 1) == 1, part + total, total)
        level += 1
    tl.store(sums + segment.to(tl.int64) * columns + cols, total, mask=inside)


def reduce_partials(partials, first=None):
    """(segments, columns) sums of (blocks, columns) partials; one segment of all blocks without `first`."""
    blocks, columns = partials.shape
    segments = 1 if first is None else first.shape[0] - 1
    out = torch.empty((segments, columns), dtype=torch.float32, device=partials.device)
    shape = reduce_launch(segments, columns, host.warp_size())
    host.run(
        reduce_kernel, shape, partials, partials, out, first, blocks, columns, partials.stride(0),
        BLOCK_ROWS=shape.block_rows, BLOCK_WIDTH=shape.block_width,
    )  # fmt: skip
    return out


def slot_blocks(slot, slots):
    """(order, block_first, table (blocks, 3)): rows by slot; each block's slot, first and last position + 1.

    Blocks past the bank's hold the rows of slot −1, then nothing; `blocks` is a bound that depends on
    shapes alone, so the host never waits for the device.
    """
    order, first, block_first = slot_order(slot, slots)
    blocks = slot.shape[0] // PARTIAL_ROWS + slots + 1
    block = torch.arange(blocks, dtype=torch.int32, device=slot.device)
    owner = torch.searchsorted(block_first, block, right=True) - 1
    banked, owner = owner < slots, owner.clamp(max=slots - 1)
    before = torch.where(banked, block_first[owner], block_first[-1])
    begin = torch.where(banked, first[owner], 0) + (block - before) * PARTIAL_ROWS
    end = torch.minimum(begin + PARTIAL_ROWS, torch.where(banked, first[owner + 1], first[0]))
    return order, block_first, torch.stack((torch.where(banked, owner, -1), begin, end), 1).to(torch.int32)


def row_blocks(rows):
    return cdiv(rows, PARTIAL_ROWS)
