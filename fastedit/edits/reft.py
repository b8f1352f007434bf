"""Representation finetuning (arXiv 2404.03592): LoReFT, and its relatives without the constraint."""

from __future__ import annotations

import torch

from ..arguments import MAX_RANK
from ..hints import Layers, Site, WhichTokens
from .form import Form
from .kinds import Edit, orthonormal_rows


class DiReFT(Edit):
    """h' = h + W₂ᵀ(W₁ h + c), trainable (arXiv 2404.03592, DiReFT): W₁ = read, c = offset, W₂ = write.

    Starts as the identity, as LoRA does: read random (uniform, ±1/√width), offset and write zero.

    Args:
        rank: 1 to 64.
    """

    trainable = True

    def __init__(
        self, rank: int, *, seed: int = 0, site: Site | None = None, layers: Layers = None, positions: WhichTokens = None,
        strength: float = 1.0, keep_norm: bool = False,
    ) -> None:  # fmt: skip
        self.seed = seed
        super().__init__(
            ("read", "offset", "write"), _check_rank(rank),
            site=site, layers=layers, positions=positions, strength=strength, keep_norm=keep_norm,
        )  # fmt: skip

    def values(self, spot, width):
        zeros = torch.zeros(self.rank, width)
        return {"read": _uniform(self, spot, width), "offset": torch.zeros(self.rank), "write": zeros}


class NoReFT(Edit):
    """h' = h + Rᵀ(W h + c − R h), trainable (arXiv 2404.03592, NoReFT: LoReFT without the constraint on R).

    Its masters are source = W, offset = c and write = R, trained separately. The normal form reads W − R.
    Starts as the identity: W = R random (uniform, ±1/√width), c zero.

    Args:
        rank: 1 to 64.
    """

    trainable = True
    allowed_names = ("source", "offset", "write")

    def __init__(
        self, rank: int, *, seed: int = 0, site: Site | None = None, layers: Layers = None, positions: WhichTokens = None,
        strength: float = 1.0, keep_norm: bool = False,
    ) -> None:  # fmt: skip
        self.seed = seed
        super().__init__(
            self.allowed_names, _check_rank(rank),
            site=site, layers=layers, positions=positions, strength=strength, keep_norm=keep_norm,
        )  # fmt: skip

    def values(self, spot, width):
        start = _uniform(self, spot, width)
        return {"source": start, "offset": torch.zeros(self.rank), "write": start.clone()}

    @staticmethod
    def derive(masters):
        return None, None, masters["source"] - masters["write"], masters["offset"], masters["write"]

    @staticmethod
    def pull_back(masters, grads):
        _, _, d_read, d_offset, d_write = grads
        both = d_write if d_read is None else -d_read if d_write is None else d_write - d_read
        return {"source": d_read, "offset": d_offset, "write": both}

    @classmethod
    def form(cls, masters):
        return Form(*cls.derive(masters))


class LoReFT(NoReFT):
    """h' = h + Rᵀ(W h + c − R h), trainable, R's rows orthonormal (arXiv 2404.03592, Eq. 2).

    Its masters are source = W, offset = c and write = R. The normal form reads W − R. R is an ordinary parameter for
    any optimizer. Its gradient is tangent to the manifold of orthonormal bases, and the first forward after a step (or
    a state_dict, or a save) brings R back onto it, all layers at once. Starts as the identity: W = R random, c zero.

    Args:
        rank: 1 to 64, at most the site's width.
    """

    constrained = "write"

    def values(self, spot, width):
        self._check_width(spot, width)
        start = orthonormal_rows(super().values(spot, width)["write"])
        return {"source": start, "offset": torch.zeros(self.rank), "write": start.clone()}

    def neutral_tensor(self, name, width):
        if name == "offset":
            return super().neutral_tensor(name, width)
        return torch.eye(self.rank, width)  # W = R, whose rows must be a basis all the same

    def _check_width(self, spot, width):
        if self.rank > width:
            raise ValueError(
                f"LoReFT has rank {self.rank}, but site {self.site!r} of layer {spot.name} is {width} wide: there are "
                f"no more than {width} orthonormal rows"
            )


def _uniform(edit, spot, width):
    generator = torch.Generator().manual_seed(edit.seed * 100_003 + spot.index)
    return (torch.rand(edit.rank, width, generator=generator) * 2 - 1) / width**0.5


def _check_rank(rank):
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise ValueError(f"rank is {rank!r}, expected a whole number from 1 to {MAX_RANK}")
    return rank
