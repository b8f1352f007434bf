"""What the Triton kernels share: loads, the one rounding, a row's coefficient, the normal form, products.

Absent parts are None and vanish at compile time. A tile of rows is (BLOCK_ROWS, BLOCK_WIDTH).
"""

import triton
import triton.language as tl

# 3.9's interpreter truncates where the GPU's fp32 → bf16 conversion rounds to nearest even.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Six bf16 tensor-core products of operands split in three: fp32 to the last bits. The interpreter does not
# know the name and multiplies in fp32.
FP32_PRODUCT = tl.constexpr("ieee" if triton.knobs.runtime.interpret else "bf16x6")


# Compared with and looped over, never part of an address that is loaded in vectors.
NUMBERS = ("rows", "slots", "steps", "count", "groups")


def kernel(function):
    """A kernel that is launched: compiled once for any number of rows, slots or steps, and for any rank but one.

    Triton otherwise compiles three: for 1, for multiples of 16 and for the rest.
    """
    return triton.jit(function, do_not_specialize=NUMBERS, do_not_specialize_on_alignment=("rank",))


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 rounded once, to nearest even, to the dtype of a stream."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        rounded = tl.where(x == x, rounded, 0x7FC0).to(tl.uint16)
        return rounded.to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def load_rows(pointer, row, stride, live, cols, inside):
    """A tile of a stream in its own dtype, 0 outside; None for an absent stream."""
    if pointer is None:
        return
    else:
        at = pointer + row.to(tl.int64)[:, None] * stride + cols[None, :]
        return tl.load(at, mask=live[:, None] & inside[None, :], other=0.0)


@triton.jit
def store_rows(pointer, row, stride, live, cols, inside, value):
    at = pointer + row.to(tl.int64)[:, None] * stride + cols[None, :]
    tl.store(at, value, mask=live[:, None] & inside[None, :])


@triton.jit
def load_parameter(pointer, first, cols, inside):
    """(1 or BLOCK_ROWS, BLOCK_WIDTH) of a parameter, fp32; `first` is 0, or where each row's slot begins."""
    if pointer is None:
        return
    else:
        return tl.load(pointer + first + cols[None, :], mask=inside[None, :], other=0.0).to(tl.float32)


@triton.jit
def load_slot(slot, row, live, slots):
    """(BLOCK_ROWS,) slot, every number out of range as −1; None without slots."""
    if slot is None:
        return
    else:
        s = tl.load(slot + row, mask=live, other=-1)
        return tl.where((s >= 0) & (s < slots), s, -1)


@triton.jit
def slot_base(s):
    """(BLOCK_ROWS, 1) int64: the slot whose parameters a row loads (0 where it has none), or the number 0."""
    if s is None:
        return 0
    else:
        return tl.maximum(s, 0).to(tl.int64)[:, None]


@triton.jit
def load_coefficient(coefficient, s, row, live, SHARED_K: tl.constexpr):
    """(BLOCK_ROWS, 1) coefficient, 0 for slot −1; None where it is 1 for every row."""
    if coefficient is None:
        if s is None:
            return
        else:
            return tl.where(s < 0, 0.0, 1.0)[:, None]
    else:
        if SHARED_K:
            k = tl.load(coefficient + row * 0, mask=live, other=0.0)
        else:
            k = tl.load(coefficient + row, mask=live, other=0.0)
        if s is not None:
            k = tl.where(s < 0, 0.0, k)
        return k[:, None]


@triton.jit
def edited(h, s, b, added, k):
    """h + k ((s − 1) h + b + added): h itself where k = 0, s h + b + added where k = 1."""
    full = h
    if s is not None:
        full = s * h
    if b is not None:
        full = full + b
    if added is not None:
        full = full + added
    if k is None:
        return full
    else:
        update = tl.zeros_like(h)
        if s is not None:
            update = (s - 1.0) * h
        if b is not None:
            update = update + b
        if added is not None:
            update = update + added
        return tl.where(k == 0.0, h, tl.where(k == 1.0, full, h + k * update))


@triton.jit
def edit_input(x, residual, ON_SUM: tl.constexpr):
    """What the edit sees, in fp32: x, or residual + x."""
    h = x.to(tl.float32)
    if ON_SUM:
        h = residual.to(tl.float32) + h
    return h


@triton.jit
def edit_output(h, x, residual, s, b, added, k, ON_SUM: tl.constexpr, dtype: tl.constexpr):
    """The stored value: E(h), or residual + E(x); without a residual a row of k = 0 keeps its bits."""
    y = edited(h, s, b, added, k)
    if residual is None:
        value = narrow(y, dtype)
        if k is not None:
            value = tl.where(k == 0.0, x, value)
        return value
    else:
        if not ON_SUM:
            y = residual.to(tl.float32) + y
        return narrow(y, dtype)


@triton.jit
def row_product(a, b):
    """a @ b for what is stored with a stream. The sum over one term keeps Triton's AMD backend from storing
    the stream in the matrix cores' layout, 64 bits a thread instead of 128."""
    product = tl.dot(a, b, input_precision=FP32_PRODUCT)
    return tl.sum(tl.reshape(product, (a.shape[0], 1, b.shape[1])), axis=1)


@triton.jit
def project_tile(
    z, h, matrix, base, rank, width, cols, inside, RANK_BLOCK: tl.constexpr, PRODUCTS: tl.constexpr
):
    """z (BLOCK_ROWS, RANK_BLOCK) + h @ matrixᵀ over this tile's columns.

    PRODUCTS: on the tensor cores, one matrix for all rows. Each tile's product is added to z in fp32, because
    the cores' accumulators truncate: emulated at 4,096 columns, an error of 1.2e-6 where 2.8e-6 is promised,
    but 2.0e-5 in one accumulator. Else one rank at a time, each row with its own slot's matrix.
    """
    ranks = tl.arange(0, RANK_BLOCK)
    if PRODUCTS:
        at = matrix + ranks[:, None] * width + cols[None, :]
        m = tl.load(at, mask=(ranks < rank)[:, None] & inside[None, :], other=0.0)
        return z + tl.dot(h, tl.trans(m), input_precision=FP32_PRODUCT)
    else:
        for r in range(rank):
            m = load_parameter(matrix, (base * rank + r) * width, cols, inside)
            z = tl.where(ranks[None, :] == r, z + tl.sum(h * m, axis=1)[:, None], z)
        return z


@triton.jit
def expand_tile(z, matrix, base, rank, width, cols, inside, RANK_BLOCK: tl.constexpr, PRODUCTS: tl.constexpr):
    """z @ matrix on this tile's columns; see project_tile."""
    ranks = tl.arange(0, RANK_BLOCK)
    if PRODUCTS:
        at = matrix + ranks[:, None] * width + cols[None, :]
        m = tl.load(at, mask=(ranks < rank)[:, None] & inside[None, :], other=0.0)
        return row_product(z, m)
    else:
        added = tl.zeros((z.shape[0], cols.shape[0]), tl.float32)
        for r in range(rank):
            m = load_parameter(matrix, (base * rank + r) * width, cols, inside)
            added += tl.sum(tl.where(ranks[None, :] == r, z, 0.0), axis=1)[:, None] * m
        return added


@triton.jit
def load_ranks(pointer, first, rank, live, RANK_BLOCK: tl.constexpr):
    """(BLOCK_ROWS or 1, RANK_BLOCK) of z or offset, from element `first` (…, 1) on; 0 outside."""
    ranks = tl.arange(0, RANK_BLOCK)
    return tl.load(pointer + first + ranks[None, :], mask=live & (ranks < rank)[None, :], other=0.0)


@triton.jit
def store_ranks(pointer, row, rank, live, z, RANK_BLOCK: tl.constexpr):
    ranks = tl.arange(0, RANK_BLOCK)
    at = pointer + row.to(tl.int64)[:, None] * rank + ranks[None, :]
    tl.store(at, z, mask=live[:, None] & (ranks < rank)[None, :])
