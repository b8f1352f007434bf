"""Edits, stacks and comparisons that the tests of patching share."""

import copy

import tiny_models as tiny
import torch

import fastedit as fe
from fastedit.edits.form import Form
from fastedit.patching.handle import handles


def random_form(rank=2, width=tiny.WIDTH, seed=3):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g) * 0.2

    return Form(1 + draw(width), draw(width), draw(rank, width), draw(rank), draw(rank, width))


def scaled_then_low_rank(form, site, layers):
    """The form as a stack of two edits: the low-rank part reads the hidden states before they are scaled."""
    read = form.read / form.scale
    offset = form.offset - read @ form.bias
    return [
        fe.ScaleBias(form.scale, form.bias, site=site, layers=layers),
        fe.LowRank(read, offset, form.write, site=site, layers=layers),
    ]


def scrambled(handle, seed=5):
    """Give every tensor of a handle random values."""
    g = torch.Generator().manual_seed(seed)
    own = handle.named_tensors()
    handle.load_tensors({k: t + 0.2 * torch.randn(t.shape, generator=g) for k, t in own.items()})
    return handle


def everything(**where):
    """A stack with every kind of edit in it."""
    g = torch.Generator().manual_seed(7)
    direction, plane = torch.randn(tiny.WIDTH, generator=g), torch.randn(2, tiny.WIDTH, generator=g)
    return [
        fe.RED(), fe.Steer(direction, strength=0.5, **where), fe.Ablate(plane, site="attn"),
        fe.Clamp(direction, 0.3, **where), fe.Amplify(direction, 1.5, site="mlp"),
        fe.Rotate(plane, 0.4, **where),
        fe.DiReFT(2, **where), fe.NoReFT(2, site="attn"),
    ]  # fmt: skip


def tiny_plain(model):
    """The same edits on the plain path."""
    other = copy.deepcopy(model)
    (handle,) = handles(other)
    tensors, edits = {k: t.clone() for k, t in handle.named_tensors().items()}, handle.edits
    handle.remove()
    fe.patch(other, edits, fused=False).load_tensors(tensors)
    return other


def paths(handle):
    return {row["site"]: row["path"] for row in handle.report().rows}
