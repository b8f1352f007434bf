"""Where a model's layers and their sites are: the table, then a search by structure, then a refusal."""

from torch import nn

from . import bert, gpt2, llama, mixture, parallel, residual, t5
from .family import Family, Input, Layer, Part, PostNorm, PreNormLayer, PreNormSublayer, submodule
from .steps import ParallelLayer, ResidualLayer, Step
from .unknown import family_of_unknown

TABLE = (
    llama.FAMILY, mixture.FAMILY, bert.FAMILY, bert.DEBERTA, bert.DEBERTA_V2, gpt2.FAMILY, t5.FAMILY,
    *residual.FAMILIES, parallel.GPT_NEOX, parallel.FALCON,
)  # fmt: skip

__all__ = [
    "TABLE",
    "Family",
    "Input",
    "Layer",
    "ParallelLayer",
    "Part",
    "PostNorm",
    "PreNormLayer",
    "PreNormSublayer",
    "ResidualLayer",
    "Step",
    "alternatives",
    "find_layers",
    "submodule",
]


def find_layers(model):
    """Every layer of the model in order, the encoder's before the decoder's.

    Raises:
        ValueError: no list of layers was found (says what was looked for), or several that are not an
            encoder and a decoder (says which; patch the submodule that holds one).
    """
    stacks = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            families = [_family(layer) for layer in module]
            if all(families):
                stacks[path] = list(zip(module, families, strict=True))
    if not stacks:
        stacks = _search(model)
    named = _named(stacks)
    layers = []
    for stack, path, members in named:
        for number, (module, family) in enumerate(members):
            last = number + 1 == len(members) and stack == named[-1][0]
            final = _final(model, path, members) if last else None
            layers.append(Layer(f"{stack}.{number}", len(layers), module, family, number == 0, final))
    return layers


def alternatives(family):
    """A family's recipes by owner, each a list of which the first that is proved is used."""
    by_owner = {}
    for recipe in family.fused:
        by_owner.setdefault(recipe.owner, []).append(recipe)
    return list(by_owner.values())


def _final(model, path, members):
    """What ends the stack at `path`: the module behind its last layer, or that layer; None if not known."""
    layer, family = members[-1]
    if family.final is None:
        return None
    holder = model.get_submodule(path.rpartition(".")[0])
    behind = (submodule(holder, name) for name in family.final)
    return next((module for module in behind if module is not None), layer)


def _family(layer):
    return next((family for family in TABLE if family.matches(layer)), None)


def _search(model):
    """The list of blocks that holds the most parameters in a model that no table entry describes."""
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(m) for m in module}) == 1
    }
    size = {path: sum(p.numel() for p in module.parameters()) for path, module in lists.items()}
    if not size or max(size.values()) == 0:
        entries = "; ".join(f"{f.name}: {', '.join(p for p in f.sites.values() if p and isinstance(p, str))}" for f in TABLE)
        raise ValueError(
            f"{type(model).__name__} has no layers to patch: looked for a ModuleList whose members hold the "
            f"modules of a known family ({entries}), then for any ModuleList of equal blocks with parameters"
        )
    path = max(size, key=size.get)
    return {path: [(layer, family_of_unknown(layer)) for layer in lists[path]]}


def _named(stacks):
    """[(stack name, path, members)]: "layers" alone, or "encoder" and "decoder"."""
    if len(stacks) == 1:
        return [("layers", *next(iter(stacks.items())))]
    sides = {}
    for path, members in stacks.items():
        side = [part for part in path.split(".") if part in ("encoder", "decoder")]
        sides.setdefault(side[-1] if side else None, []).append((path, members))
    if set(sides) == {"encoder", "decoder"} and all(len(found) == 1 for found in sides.values()):
        return [(side, *sides[side][0]) for side in ("encoder", "decoder")]
    raise ValueError(
        f"found {len(stacks)} stacks of layers ({', '.join(stacks)}), expected one, or an encoder and a "
        "decoder; patch the submodule that holds the one you mean"
    )
