"""LoReFT: representation finetuning in a subspace whose basis stays orthonormal (arXiv 2404.03592)."""

import torch

from .edits import NoReFT, orthonormal_rows


class LoReFT(NoReFT):
    """h' = h + Rᵀ(W h + c − R h), trainable, R's rows orthonormal (arXiv 2404.03592, Eq. 2).

    Its masters are source = W, offset = c and write = R; the normal form reads W − R. R is an ordinary parameter for
    any optimiser: its gradient lies on the manifold of orthonormal bases, and the first forward after a step (or a
    state_dict, or saving) brings R back onto it, all layers at once. Starts as the identity: W = R random, c zero.

    rank: 1 to 64, at most the site's width. seed: of the private generator that draws the start; layers differ.
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
