"""The edits of the study: for each kind one realistic set of values, the same for every variant.

red       scale ⊙ h + bias on the FFN's output of every layer
steer     h + v at every block's output, another v in each layer
ablate    h − (h·v̂) v̂ at every block's output, one v̂ for all
lowrank4  h + (W h + c − R h) R at every block's output: LoReFT's form with orthonormal R, rank 4; in normal form
          read = W − R, offset = c, write = R
"""

from dataclasses import dataclass, replace

import torch

from fastedit.form import Form

RANK = 4


@dataclass(frozen=True)
class Values:
    """forms: one Form a layer, fp32. trainable: a variant makes parameters of them, or leaves them constant."""

    kind: str
    site: str
    forms: tuple
    trainable: bool = False

    def to(self, device, dtype):
        """In another dtype, as plain PyTorch would hold them in a model of that dtype."""
        cast = (Form(*(None if t is None else t.to(device, dtype) for t in f.tensors())) for f in self.forms)
        return replace(self, forms=tuple(cast))

    def first(self, layers):
        return replace(self, forms=self.forms[:layers])

    def stacked(self, name):
        """(layers, …) of one of the normal form's tensors."""
        return torch.stack([getattr(form, name) for form in self.forms])

    def sources(self):
        """(layers, rank, width): LoReFT's W."""
        return self.stacked("read") + self.stacked("write")


def values(kind, width, layers, device="cpu", trainable=False):
    """The Values of a kind for a model."""
    generator = torch.Generator().manual_seed(1)
    site, draw = _KINDS[kind]
    forms = draw(width, layers, lambda *shape: torch.randn(*shape, generator=generator))
    return Values(kind, site, tuple(forms), trainable).to(device, torch.float32)


def _red(width, layers, normal):
    for _ in range(layers):
        yield Form(scale=1 + 0.02 * normal(width), bias=0.02 * normal(width))


def _steer(width, layers, normal):
    for _ in range(layers):
        yield Form(bias=0.02 * normal(width))


def _ablate(width, layers, normal):
    direction = normal(1, width)
    direction /= direction.norm()
    for _ in range(layers):
        yield Form(read=direction, write=-direction)


def _low_rank(width, layers, normal):
    for _ in range(layers):
        basis = torch.linalg.qr(normal(width, RANK)).Q.T.contiguous()
        yield Form(read=0.3 * normal(RANK, width) / width**0.5, offset=0.02 * normal(RANK), write=basis)


_KINDS = {
    "red": ("mlp", _red), "steer": ("block", _steer), "ablate": ("block", _ablate), "lowrank4": ("block", _low_rank),
}  # fmt: skip
