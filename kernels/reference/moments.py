"""moments: count, mean and M2 = Σ (h − mean)² of each group's rows, in plain PyTorch and float64, in two passes."""

import torch


def moments(hidden, group, groups):
    """(count (groups,) int64, mean (groups, width) float64, m2 likewise); zeros for a group without rows.

    group (rows,) integers, or None for one group of all rows. Rows of a number outside [0, groups) are left out.
    """
    rows, width = hidden.shape
    if group is None:
        group = torch.zeros(rows, dtype=torch.int64, device=hidden.device)
    group = torch.where((group < 0) | (group >= groups), groups, group.long())  # those left out: one group more
    h = hidden.double()
    count = torch.zeros(groups + 1, dtype=torch.int64, device=hidden.device).index_add(0, group, torch.ones_like(group))
    zeros = h.new_zeros(groups + 1, width)
    mean = zeros.index_add(0, group, h) / count.clamp_min(1)[:, None]
    m2 = zeros.index_add(0, group, (h - mean[group]).square())
    return count[:-1], mean[:-1], m2[:-1]
