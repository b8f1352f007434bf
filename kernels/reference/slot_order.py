"""Rows sorted by slot, so that parameter gradients over slots are fixed-block column sums like any other.

Tensors alone, no host synchronisation: shapes depend on (rows, slots) only.
"""

import torch

BLOCK_ROWS = 256


def slot_order(slot, slots):
    """(order (rows,), first (slots + 1,), block_first (slots + 1,)), int32.

    Slot s owns order[first[s]:first[s + 1]] (in row order: the sort is stable), in blocks of
    BLOCK_ROWS rows numbered from block_first[s]. Rows of slot −1 come before first[0].
    """
    slot = torch.where((slot < 0) | (slot >= slots), torch.full_like(slot, -1), slot)
    sorted_slot, order = torch.sort(slot, stable=True)
    edges = torch.arange(slots + 1, device=slot.device, dtype=slot.dtype)
    first = torch.searchsorted(sorted_slot, edges).to(torch.int32)
    blocks = (first.diff() + BLOCK_ROWS - 1) // BLOCK_ROWS
    block_first = torch.zeros_like(first)
    block_first[1:] = blocks.cumsum(0)
    return order.to(torch.int32), first, block_first
