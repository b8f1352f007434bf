"""Count, mean and variance of hidden states that come in batches, or from several processes. Only sums are stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from .. import ops

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_NAMES = ("count", "mean", "m2")


class Moments:
    """Running moments of `groups` groups of rows (…, width), merged exactly by Chan's formula in float64::

        moments = fastedit.Moments(width, groups=2)
        for batch in batches:
            moments.update(hidden_states(batch), group=labels)
        direction = moments.mean()[1] - moments.mean()[0]

    However the rows are cut into batches or processes, mean and variance differ by float64's rounding alone.

    Args:
        width: of the rows. groups: how many. device: of the sums; the CPU by default.

    Raises:
        ValueError: width or groups below 1.
    """

    def __init__(self, width: int, groups: int = 1, device: torch.device | str | None = None) -> None:
        if width < 1 or groups < 1:
            raise ValueError(f"width is {width} and groups {groups}, expected numbers from 1 on")
        self._count = torch.zeros(groups, dtype=torch.int64, device=device)
        self._mean = torch.zeros(groups, width, dtype=torch.float64, device=device)
        self._m2 = torch.zeros_like(self._mean)

    @property
    def width(self) -> int:
        """Of the rows."""
        return self._mean.shape[1]

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return len(self._count)

    @property
    def count(self) -> torch.Tensor:
        """(groups,) int64."""
        return self._count.clone()

    def update(
        self, hidden: torch.Tensor, group: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> Moments:
        """Add the rows of hidden (…, width). group and mask are as in fastedit.ops.moments. Returns self."""
        if hidden.shape[-1:] != (self.width,):
            raise ValueError(f"hidden has shape {tuple(hidden.shape)}, expected (…, {self.width})")
        found = ops.moments(hidden, group, mask, self.groups)
        self._add(*(t.to(self._mean.device) for t in found))
        return self

    def merge(self, other: Moments) -> Moments:
        """Add the rows of other, Moments of the same groups and width. Returns self. ValueError for anything else."""
        if not isinstance(other, Moments) or other._mean.shape != self._mean.shape:
            shape = tuple(other._mean.shape) if isinstance(other, Moments) else type(other).__name__
            raise ValueError(f"cannot merge {shape} into Moments of (groups, width) {tuple(self._mean.shape)}")
        self._add(*(t.to(self._mean.device) for t in (other._count, other._mean, other._m2)))
        return self

    def mean(self) -> torch.Tensor:
        """(groups, width) float64. NaN for a group without rows."""
        return torch.where(self._count[:, None] > 0, self._mean, torch.nan)

    def variance(self, correction: int = 1) -> torch.Tensor:
        """M2 / (count − correction), (groups, width) float64. NaN if the divisor is 0 or less."""
        left = (self._count - correction)[:, None]
        return torch.where(left > 0, self._m2 / left, torch.nan)

    def all_reduce(self, process_group: ProcessGroup | None = None) -> Moments:
        """Merge the moments of all processes of torch.distributed, with the same bits in each. Returns self.

        process_group: None for the default one.

        They are gathered and merged in the order of ranks. A sum of counts, means and M2 would not be exact.
        """
        import torch.distributed as dist

        size = dist.get_world_size(process_group)
        gathered = []
        for tensor in (self._count, self._mean, self._m2):
            gathered.append([torch.empty_like(tensor) for _ in range(size)])
            dist.all_gather(gathered[-1], tensor.contiguous(), group=process_group)
        for tensor in (self._count, self._mean, self._m2):
            tensor.zero_()
        for found in zip(*gathered, strict=True):
            self._add(*found)
        return self

    def state_dict(self) -> dict[str, torch.Tensor]:
        """{"count", "mean", "m2"}: copies."""
        return {"count": self._count.clone(), "mean": self._mean.clone(), "m2": self._m2.clone()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take the numbers of state, a state_dict. ValueError for other names, shapes or dtypes, before any is taken."""
        if set(state) != set(_NAMES):
            raise ValueError(f"the state has {', '.join(sorted(state))}; expected {', '.join(_NAMES)}")
        for name, mine in zip(_NAMES, (self._count, self._mean, self._m2), strict=True):
            if state[name].shape != mine.shape or state[name].dtype != mine.dtype:
                raise ValueError(
                    f"{name} is {state[name].dtype} {tuple(state[name].shape)}, expected {mine.dtype} {tuple(mine.shape)}"
                )
        for name, mine in zip(_NAMES, (self._count, self._mean, self._m2), strict=True):
            mine.copy_(state[name])

    def _add(self, count, mean, m2):
        """Chan's formula. A group without rows on one side takes the other side's numbers as they are."""
        total = self._count + count
        share = (count.double() / total.clamp_min(1))[:, None]  # integers alone would divide in fp32
        delta = mean - self._mean
        self._mean = torch.where(self._count[:, None] == 0, mean, self._mean + delta * share)
        self._m2 = self._m2 + m2 + delta.square() * (self._count[:, None] * share)
        self._count = total

    def __repr__(self):
        return f"Moments(width={self.width}, groups={self.groups}, rows={int(self._count.sum())})"
