"""Edits, banks and runs that the tests of banks share."""

import tiny_models as tiny
import torch

import fastedit as fe


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def red(seed, **where):
    """RED on every layer, layers differing; large enough to matter."""
    layers = where.pop("count", tiny.LAYERS)
    scale, bias = 1 + 0.3 * drawn(seed, layers, tiny.WIDTH), 0.5 * drawn(seed + 1000, layers, tiny.WIDTH)
    return fe.RED(scale, bias, **where)


def low_rank(seed, rank=2, **where):
    read, offset, write = drawn(seed, rank, tiny.WIDTH), drawn(seed + 1, rank), drawn(seed + 2, rank, tiny.WIDTH)
    return fe.LowRank(0.2 * read, offset, 0.4 * write, **where)


def three(count=tiny.LAYERS):
    """Edits of different kinds, ranks and sites, by name."""
    return {
        "anna": red(1, count=count),
        "ben": [fe.Steer(drawn(5, tiny.WIDTH), strength=0.7, site="mlp"), low_rank(6, site="attn")],
        "cleo": [fe.Ablate(drawn(9, tiny.WIDTH)), low_rank(10, rank=1, site="mlp", layers=[1, 2]), red(3, count=count)],
    }


SERVED = {"sites": ("mlp", "attn", "block"), "rank": 3}


def bank_of(model, edits=None, capacity=4, **options):
    bank = fe.Bank(model, capacity, **SERVED | options)
    for name, edit in (three() if edits is None else edits).items():
        bank.add(name, edit)
    return bank


def logits(model, ids, **more):
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def ids(batch=4, length=7, seed=2):
    return torch.randint(3, tiny.VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
