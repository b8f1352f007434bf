"""value_ascent: h' = h + a Σ_t ∇V(h_t); formulas in the reference, whose dense products these are, too.

Streams: the steps of one hidden layer read the rows of gram, which is symmetric, of units that change sign.
Grid: a program for a row of hidden states, with all its units' z and slope in registers. Units that changed sign are
taken one after another in their order, so every sum has one order, and a row depends on nothing but itself.
"""

import torch

import triton
import triton.language as tl

from ..reference.value_ascent import ascend
from . import host
from .device import kernel
from .launch import Launch, next_power_of_2, warps

MAX_UNITS = 8192  # in the registers of one program: six values a unit


@triton.jit
def next_flip(flipped, on, units, after, BLOCK: tl.constexpr):
    """2 unit + on of the first flipped unit behind `after`; 2 BLOCK where there is none."""
    return tl.min(tl.where(flipped & (units > after), 2 * units + on.to(tl.int32), 2 * BLOCK), axis=0)


@kernel
def ascent_steps_kernel(z, slope, head, gram, total, step_size, units, steps, BLOCK: tl.constexpr):
    """total = head ⊙ (the number of steps for which the unit is on). A unit that goes on at step t is counted −t, one
    that goes off t: what is on at the end adds all."""
    unit = tl.arange(0, BLOCK)
    inside = unit < units
    at = tl.program_id(0).to(tl.int64) * units + unit
    now = tl.load(z + at, mask=inside, other=0.0)
    rate = tl.load(slope + at, mask=inside, other=0.0)
    a = tl.load(step_size)
    lost = tl.zeros((BLOCK,), tl.float32)  # by rate's additions: hundreds of terms, and no drift
    count = tl.zeros((BLOCK,), tl.float32)
    for t in range(1, steps):
        old = now
        now = old + a * rate
        on = now > 0.0
        flipped = (on != (old > 0.0)) & inside
        count += tl.where(flipped, tl.where(on, -1.0, 1.0) * t, 0.0)
        code = next_flip(flipped, on, unit, -1, BLOCK)
        while code < 2 * BLOCK:
            j = code // 2
            k = tl.load(head + j) * (2 * (code % 2) - 1).to(tl.float32)
            row = tl.load(gram + j.to(tl.int64) * units + unit, mask=inside, other=0.0)
            term = k * row - lost
            added = rate + term
            lost = (added - rate) - term
            rate = added
            code = next_flip(flipped, on, unit, j, BLOCK)
    count += tl.where(now > 0.0, steps * 1.0, 0.0)
    tl.store(total + at, count * tl.load(head + unit, mask=inside, other=0.0), mask=inside)


def steps_launch(rows, units, warp_size=32):
    block = max(64, next_power_of_2(units))
    return Launch(1, block, warps(block, 16, warp_size), 1, rows)


def flips(z, slope, head, gram, steps, step_size):
    """reference.value_ascent.ascend's `flips`."""
    rows, units = z.shape
    total = torch.empty_like(z)
    shape = steps_launch(rows, units, host.warp_size())
    rate = torch.full((1,), step_size, dtype=torch.float32, device=z.device)
    host.run(
        ascent_steps_kernel, shape, z, z, slope, head, host.dense(gram), total, rate, units, steps, BLOCK=shape.block_width
    )
    return total


def value_ascent(hidden, weight, bias, weight2, bias2, head, gram, steps, step_size):
    """h' (rows, width) in hidden's dtype; see the reference."""
    by_flips = flips if weight.shape[0] <= MAX_UNITS else None
    return ascend(hidden, weight, bias, weight2, bias2, head, gram, steps, step_size, by_flips)
