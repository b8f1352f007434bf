"""From declarative edits to masters for every layer: all that can fail, before the model is touched."""

from .masters import Masters
from .per_layer import Spot


def plan(edit, layers):
    """[(layer, Masters)] of one edit.

    Raises:
        ValueError: a layer or site that does not exist, or a width that does not fit.
    """
    chosen = choose(edit, layers)
    members = []
    for order, layer in enumerate(chosen):
        module = layer.at(edit.site)
        spot = Spot(layer.name, layer.index, len(layers), order, len(chosen))
        members.append((layer, Masters(edit, spot, site_width(module, layer), site_device(module))))
    return members


def choose(edit, layers):
    """The layers an edit acts on, in the order it names them."""
    if edit.layers is None:
        chosen = [layer for layer in layers if layer.at(edit.site) is not None]
        if not chosen:
            raise ValueError(_no_site(edit, layers[0]))
        return chosen
    chosen = []
    for wanted in edit.layers:
        if isinstance(wanted, str):
            found = [layer for layer in layers if wanted in (layer.name, layer.name.partition(".")[0])]
        else:
            found = [layers[wanted]] if -len(layers) <= wanted < len(layers) else []
        if not found:
            names = f"{layers[0].name} to {layers[-1].name}"
            raise ValueError(f"there is no layer {wanted!r}: the model has {len(layers)} layers, {names}")
        chosen += [layer for layer in found if layer not in chosen]
    for layer in chosen:
        if layer.at(edit.site) is None:
            raise ValueError(_no_site(edit, layer))
    return chosen


def _no_site(edit, layer):
    found = ", ".join(repr(site) for site in layer.family.sites)
    return (
        f"site {edit.site!r} was not found in {type(layer.module).__name__} (layer {layer.name}): no linear "
        f"map there is unmistakably its last one; found {found}. A table entry in "
        "fastedit/families says where it is"
    )


def site_width(module, layer):
    """How wide the hidden states at a site are."""
    for name in ("out_features", "nf"):
        if isinstance(getattr(module, name, None), int):
            return getattr(module, name)
    for site in ("attn", "mlp"):
        inner = layer.at(site)
        if inner is not None and inner is not module:
            return site_width(inner, layer)
    widths = [p.shape[0] for p in module.parameters() if p.dim() == 1]
    if not widths:
        raise ValueError(f"the width of layer {layer.name} was not found: it has no linear map and no norm")
    return max(set(widths), key=widths.count)


def site_device(module):
    """Where the module's weights are; where accelerate offloads them, where it will run."""
    found = next(module.parameters()).device
    if found.type != "meta" and "_hf_hook" not in module.__dict__:
        return found
    hooks = (m.__dict__.get("_hf_hook") for m in module.modules())
    running = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((device for device in running if device is not None), found)
