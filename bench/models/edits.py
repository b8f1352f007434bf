"""The edits of the study: for each kind one realistic set of values, the same for every variant.

red       scale ⊙ h + bias on the FFN's output of every layer
steer     h + v at every block's output, another v in each layer
ablate    h − (h·v̂) v̂ at every block's output, one v̂ for all: a token's embedding, of which hidden states have more than
          of a random direction
lowrank4  h + (W h + c − R h) R at every block's output: LoReFT's form with orthonormal R, rank 4; in normal form
          read = W − R, offset = c, write = R
"""

from dataclasses import dataclass, replace

import torch

from fastedit.edits.form import Form

from .sizes import blocks

RANK = 4
TOKEN = 7  # the one that is decoded


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


def values(kind, model, trainable=False):
    """The Values of a kind for a base model, on its device."""
    generator = torch.Generator().manual_seed(1)
    site, draw = _KINDS[kind]
    forms = draw(model, model.config.hidden_size, lambda *shape: torch.randn(*shape, generator=generator))
    return Values(kind, site, tuple(forms), trainable).to(model.device, torch.float32)


def _red(model, width, normal):
    for _ in blocks(model):
        yield Form(scale=1 + 0.02 * normal(width), bias=0.02 * normal(width))


def _steer(model, width, normal):
    for _ in blocks(model):
        yield Form(bias=0.02 * normal(width))


def _ablate(model, width, normal):
    direction = model.get_input_embeddings().weight[TOKEN][None].float()
    direction = direction / direction.norm()
    for _ in blocks(model):
        yield Form(read=direction, write=-direction)


def _low_rank(model, width, normal):
    for _ in blocks(model):
        basis = torch.linalg.qr(normal(width, RANK)).Q.T.contiguous()
        yield Form(read=normal(RANK, width) / width**0.5, offset=0.1 * normal(RANK), write=basis)


_KINDS = {
    "red": ("mlp", _red), "steer": ("block", _steer), "ablate": ("block", _ablate), "lowrank4": ("block", _low_rank),
}  # fmt: skip
