"""A layer that no table entry describes: its sites, by structure. Served by the plain path."""

from torch import nn

from .family import Family, Input


def family_of_unknown(layer):
    """`block`, and `attn`, `mlp` and `ffn_in` where one linear map is unmistakably the last of each part."""
    sites = {"block": ""}
    width = _width(layer)
    attention = [
        name for name, _ in layer.named_children() if "attn" in name.lower() or "attention" in name.lower()
    ]
    rest = [name for name, child in layer.named_children() if name not in attention and _linears(child)]
    for site, names in (("attn", attention), ("mlp", rest)):
        paths = (
            [f"{names[0]}.{p}".rstrip(".") for p in _linears(getattr(layer, names[0]))]
            if len(names) == 1
            else []
        )
        last = paths[-1] if paths else None
        if last is not None and _outputs(layer.get_submodule(last)) == width:
            sites[site] = last
    if "mlp" in sites:
        sites["ffn_in"] = Input(sites["mlp"])
    return Family(name="unknown", sites=sites, final=None)


def _linears(module):
    """Paths of the linear maps in a module, in the order they were defined; "" for the module itself."""
    return [path for path, m in module.named_modules() if _outputs(m) is not None]


def _outputs(module):
    if isinstance(module, nn.Linear) or hasattr(module, "out_features"):
        return module.out_features
    return module.nf if hasattr(module, "nf") else None


def _width(layer):
    """The width of the residual stream: that of the layer's norms, else of most linears' outputs."""
    widths = [
        p.shape[0]
        for m in layer.modules()
        if not list(m.children()) and _outputs(m) is None
        for p in m.parameters(recurse=False)
        if p.dim() == 1
    ]
    widths = widths or [_outputs(layer.get_submodule(path)) for path in _linears(layer)]
    return max(set(widths), key=widths.count) if widths else None
