"""A layer that no table entry describes: its sites, by structure. The plain path serves it."""

import re

from .family import Family, Input, outputs_of

_ATTENTION = re.compile(r"attn|attention", re.I)
_FFN = re.compile(r"(.*_)?(mlp|ffn|feed_?forward|moe)", re.I)
_LAST = re.compile(r"(o|out|down|output|c|dense|final)_?(proj|lin|linear|layer)|w?o|out|wo|fc2|lin2|dense|dense_4h_to_h", re.I)


def family_of_unknown(layer, width=None):
    """`block`, and `attn`, `mlp` and `ffn_in` if exactly one linear map is certain to be the last of each part.

    width: of the residual stream, if the model gives it. A mixture's `mlp` is the whole block of experts.
    """
    sites = {"block": ""}
    width = width or _width(layer)
    children = [name for name, child in layer.named_children() if _linears(child) or _experts(child)]
    attention = [name for name in children if _ATTENTION.search(name)]
    rest = [name for name in children if name not in attention]
    ffn = [name for name in rest if _FFN.fullmatch(name)] or rest
    for site, names in (("attn", attention), ("mlp", ffn)):
        if len(names) == 1:
            part = getattr(layer, names[0])
            path = names[0] if _experts(part) else _last(part, names[0], width)
            if path is not None:
                sites[site] = path
    if "mlp" in sites and not _experts(layer.get_submodule(sites["mlp"])):
        sites["ffn_in"] = Input(sites["mlp"])
    return Family(name="unknown", sites=sites, final=None)


def _last(part, name, width):
    """The path of a part's last linear map: the only one by its name or its width, else the one defined last."""
    paths = _linears(part)
    fitting = [p for p in paths if outputs_of(part.get_submodule(p)) == width]
    named = [p for p in fitting if _LAST.fullmatch(p.rpartition(".")[2])]
    if len(named) != 1 and (not fitting or fitting[-1] != paths[-1]):
        return None
    return f"{name}.{(named if len(named) == 1 else fitting)[-1]}".rstrip(".")


def _experts(module):
    """Whether a module is, or holds, a mixture of experts."""
    return any("experts" in name.rpartition(".")[2] for name, _ in module.named_modules())


def _linears(module):
    """Paths of the linear maps in a module, in the order they were defined; "" for the module itself."""
    return [path for path, m in module.named_modules() if outputs_of(m) is not None]


def _width(layer):
    """The width of the residual stream: that of the layer's norms, else of most linears' outputs."""
    widths = [
        p.shape[0]
        for m in layer.modules()
        if not list(m.children()) and outputs_of(m) is None
        for p in m.parameters(recurse=False)
        if p.dim() == 1
    ]
    widths = widths or [outputs_of(layer.get_submodule(path)) for path in _linears(layer)]
    return max(set(widths), key=widths.count) if widths else None
