"""Launch shapes: pure functions of rows, width, rank, the slots' presence and the warp size. No autotuning.

What decides the order of a row's sums (block_rows, block_width, num_warps) never depends on rows, so a row's
result does not depend on how many others came with it; only steps and programs do.
Figures are per thread: 32 fp32 values of a tile are four 128-bit loads in flight per bf16 stream, and leave
room in 128 registers for two streams and two parameters.
"""

from dataclasses import dataclass

MAX_ROW = 16384  # the widest row a program keeps whole: 32 values a thread on 16 warps
MAX_VECTOR_RANK = 8  # above it, two passes of tensor-core products; an estimate, not yet measured on a GPU
HOIST_WIDTH = 8192  # scale, bias and the norm's weight stay in registers up to here (16 values each a thread)
PARTIAL_ROWS = 256  # rows in one fp32 partial of a column sum
PROGRAMS = 4096  # enough to fill any present GPU a few times over; more rows lengthen programs instead
MAX_STEPS = 16


@dataclass(frozen=True)
class Launch:
    block_rows: int
    block_width: int
    num_warps: int
    steps: int  # row blocks a program walks through
    programs: int


def cdiv(a, b):
    return -(-a // b)


def next_power_of_2(n):
    return 1 << (n - 1).bit_length()


def warps(values, per_thread, warp_size):
    """Warps that leave each thread about `per_thread` values, at most 1,024 threads."""
    count = next_power_of_2(max(1, values // (per_thread * warp_size)))
    return min(count, 1024 // warp_size)


def _steps(row_blocks, per_row_block):
    """Row blocks a program takes: one while the GPU is not full, MAX_STEPS at most."""
    return min(MAX_STEPS, max(1, row_blocks * per_row_block // PROGRAMS))


def column_tile(width, widest, narrowest):
    """The power of two in [narrowest, widest] that pads the width least, the widest among equals."""
    sizes, size = [], widest
    while size >= narrowest:
        sizes.append(size)
        size //= 2
    return min(sizes, key=lambda s: cdiv(width, s) * s)


def tile_launch(rows, width, warp_size=32):
    """Rank 0 without a norm: column tiles × row groups, 4,096 values a tile."""
    block_width = column_tile(width, 1024, 64)
    block_rows = min(4096 // block_width, 32)
    tiles, row_blocks = cdiv(width, block_width), cdiv(rows, block_rows)
    steps = _steps(row_blocks, tiles)
    num_warps = warps(block_rows * block_width, 32, warp_size)
    return Launch(block_rows, block_width, num_warps, steps, cdiv(row_blocks, steps) * tiles)


def uses_products(rank, slotted):
    """Whether the rank is taken as tensor-core products, not one read and write vector at a time."""
    return rank > MAX_VECTOR_RANK and not slotted


def fits_rows(width, rank, slotted):
    """Whether a program can keep whole rows on chip and take the rank one vector at a time."""
    return width <= MAX_ROW and not uses_products(rank, slotted)


def rows_launch(rows, width, warp_size=32, steps=None):
    """Whole rows: one of 2,048 columns or more, several narrower ones."""
    block_width = max(64, next_power_of_2(width))
    block_rows = min(max(1, 2048 // block_width), 16)
    values = block_rows * block_width
    num_warps = min(warps(values, 16, warp_size), 512 // warp_size)
    row_blocks = cdiv(rows, block_rows)
    steps = steps or _steps(row_blocks, 4)
    return Launch(block_rows, block_width, num_warps, steps, cdiv(row_blocks, steps))


def wide_launch(rows, width, rank, slotted, warp_size=32):
    """Rows walked tile by tile: 16 × 64 for tensor-core products, else wide tiles.

    Products: two warps hold both operands split in three without spilling up to rank 32 (187 registers on
    sm_90; 16 × 128 on four spills, since every warp then needs all of the rows).
    """
    if uses_products(rank, slotted):
        block_rows, block_width = 16, 64
    else:
        block_width = min(4096, max(64, next_power_of_2(width)))
        block_rows = min(max(1, 2048 // block_width), 16)
    num_warps = warps(block_rows * block_width, 16, warp_size)
    return Launch(block_rows, block_width, num_warps, 1, cdiv(rows, block_rows))


def statistics_launch(rows, width, warp_size=32):
    """Row sums of two streams, walked tile by tile."""
    block_width = min(2048, max(64, next_power_of_2(width)))
    block_rows = min(2048 // block_width, 16)
    num_warps = warps(block_rows * block_width, 16, warp_size)
    return Launch(block_rows, block_width, num_warps, 1, cdiv(rows, block_rows))


def columns_launch(partials, width, rank, warp_size=32):
    """Backward over column tiles × blocks of PARTIAL_ROWS rows, narrow so that 4,096 × 4,096 is 512 programs.

    Registers on sm_90: 93 at rank 0, 128 behind a norm; 16 × 64 on four warps 168–237 up to rank 32.
    """
    block_rows, block_width = 16, 64 if rank else column_tile(width, 128, 64)
    num_warps = warps(block_rows * block_width, 8 if rank else 16, warp_size)
    steps = PARTIAL_ROWS // block_rows
    return Launch(block_rows, block_width, num_warps, steps, partials * cdiv(width, block_width))


def reduce_launch(segments, columns, warp_size=32):
    """The tree over partials: 16 of them × 128 columns at a time (119 registers on sm_90; 32 took 244)."""
    return Launch(16, 128, warps(16 * 128, 8, warp_size), 1, segments * cdiv(columns, 128))


def rank_block(rank):
    """Rank padded for a tensor-core product."""
    return max(16, next_power_of_2(rank))
