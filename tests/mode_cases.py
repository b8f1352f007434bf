"""The kinds of edit that every run mode is tested with: add a kind here, and it is tested in all of them."""

import tiny_models as tiny
import torch

import fastedit as fe


def _rows(n, seed=11):
    rows = torch.randn(n, tiny.WIDTH, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=-1, keepdim=True)


KINDS = {
    "red": lambda **where: fe.RED(**where),
    "scale": lambda **where: fe.ScaleBias(bias=False, **where),
    "steer": lambda **where: fe.Steer(_rows(1)[0], strength=0.5, **where),
    "ablate": lambda **where: fe.Ablate(_rows(2), **where),
    "clamp": lambda **where: fe.Clamp(_rows(1)[0], 0.3, **where),
    "low rank": lambda **where: fe.LowRank(_rows(2), torch.tensor([0.1, -0.2]), _rows(2, seed=12), **where),
    "noreft": lambda **where: fe.NoReFT(2, **where),
    "direft": lambda **where: fe.DiReFT(2, **where),
}


def one_of_each(family):
    """Every kind once, spread over the layers and sites, so that one compilation serves for all."""
    sites, layers = ("mlp", "attn", "block"), tiny.number_of_layers(family)
    return [make(site=sites[n % 3], layers=[n % layers]) for n, make in enumerate(KINDS.values())]
