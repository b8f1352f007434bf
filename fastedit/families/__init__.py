"""Where a model's layers and their sites are: the table, then a search by structure, then a refusal."""

from dataclasses import replace

from . import bert, gpt2, llama, mixture, parallel, residual, t5
from .family import Family, Input, Layer, Part, PostNorm, PreNormLayer, PreNormSublayer, outputs_of, submodule
from .search import embedding_width, stacks_of, stream_width
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
    "outputs_of",
    "submodule",
]


def find_layers(model):
    """Every layer of the model in order, the encoder's before the decoder's.

    In a model that reads images or sound beside text, these are the layers that write the text. Patch the submodule of
    another stack to edit that one.

    Raises:
        ValueError: no list of layers was found (the message says what was looked for), or several lists could be meant
            (the message names them; patch the submodule that holds one).
    """
    layers = []
    stacks = stacks_of(model, _family)
    for stack, path in stacks:
        modules, width, embedded = model.get_submodule(path), stream_width(model, path), embedding_width(model, path)
        members = [(module, _family(module) or family_of_unknown(module, width)) for module in modules]
        for number, (module, family) in enumerate(members):
            last = number + 1 == len(members) and stack == stacks[-1][0]
            final = _final(model, path, members) if last else None
            layers.append(Layer(f"{stack}.{number}", len(layers), module, family, number == 0, final, width, embedded))
    return _seen(model, layers)


def _seen(model, layers):
    """The layers, with what they hand on where the config, the embedding and their maps do not agree on a width."""
    if not any(e.width and e.ends() and e.width not in e.ends() | {e.embedded} for e in layers):
        return layers
    from . import probe  # which knows swapped classes, and they the families

    shapes = probe.output_shapes(model, layers) or {}
    widths = {index: {shape and shape[-1] for shape in found} for index, found in shapes.items()}
    seen = {index: next(iter(found)) for index, found in widths.items() if len(found) == 1}
    return [replace(layer, handed=seen.get(layer.index)) for layer in layers]


def alternatives(family):
    """A family's recipes, one list per owner. The first recipe of a list that is proved is used."""
    by_owner = {}
    for recipe in family.fused:
        by_owner.setdefault(recipe.owner, []).append(recipe)
    return list(by_owner.values())


def _final(model, path, members):
    """What ends the stack at `path`: the module after its last layer, or that layer. None if not known."""
    layer, family = members[-1]
    if family.final is None:
        return None
    holder = model.get_submodule(path.rpartition(".")[0])
    behind = (submodule(holder, name) for name in family.final)
    return next((module for module in behind if module is not None), layer)


def _family(layer):
    return next((family for family in TABLE if family.matches(layer)), None)
