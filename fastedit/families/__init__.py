"""Where a model's layers and their sites are: the table, then a search by structure, then a refusal."""

from dataclasses import replace

from ..edits.sites import SITES
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
    "near_misses",
    "outputs_of",
    "register",
    "submodule",
]

_REGISTERED = {}  # name → Family of the user's own, looked at before the table


def register(family):
    """Tell fastedit where things are in the layers of your own model (docs/add-a-family.md). Returns the family.

    A registered family is looked at before the table. Registering its name again replaces it. What its recipes say is
    compared with the layer's own forward before it is used, so a recipe that is wrong costs speed and not correctness; a
    site that names another module than you mean edits there.

    Args:
        family: a Family. Its sites have `mlp`, `attn` and `block`, each a path inside the layer, an Input or a Part.

    Raises:
        TypeError, ValueError: no Family, a site that is missing or not known, a name of the table's.
    """
    if not isinstance(family, Family):
        raise TypeError(f"family is {family!r:.60}, expected a fastedit.families.Family")
    missing = [site for site in ("mlp", "attn", "block") if site not in family.sites]
    unknown = [site for site in family.sites if site not in SITES]
    if missing or unknown:
        raise ValueError(f"the sites of {family.name!r} lack {missing} or are not known: {unknown}; known are {', '.join(SITES)}")
    for site, place in family.sites.items():
        if not isinstance(place, (str, Input, Part)):
            raise TypeError(f"site {site!r} is {place!r:.60}, expected a path such as 'mlp.down_proj', an Input or a Part")
    if any(family.name == known.name for known in TABLE):
        raise ValueError(f"{family.name!r} is the name of a family of fastedit's own table: give yours another")
    _REGISTERED[family.name] = family
    return family


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


def near_misses(layer):
    """Which registered families one wrong path keeps from a layer, as a text; "" if none."""
    lacking = {family.name: family.missing(layer) for family in _REGISTERED.values()}
    return "".join(f"; {name} has {paths[0]!r}, which is not in it" for name, paths in lacking.items() if len(paths) == 1)


def _family(layer):
    return next((family for family in (*_REGISTERED.values(), *TABLE) if family.matches(layer)), None)
