"""From declarative edits to masters for every layer: all that can fail, before the model is touched."""

import itertools

from .gating import Gating, Sensor
from .masters import Masters
from .per_layer import Spot

_IN_ORDER = ("attn", "mlp", "block")  # as a layer passes its sites
_numbers = itertools.count()  # what a gate decided must never be taken for another's


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
    if edit.gate is not None:
        _gate(edit, members, layers)
    return members


def _gate(edit, members, layers):
    """Give an edit's masters their Gating."""
    gates, key = edit.gate.leaves(), f"gate{next(_numbers)}"
    shared = {}
    for number, gate in enumerate(gates):
        if gate.layer is not None:
            shared[number] = _sensor_elsewhere(gate, f"{key}.{number}", edit, members, layers)
    for order, (layer, masters) in enumerate(members):
        module, sensors = layer.at(edit.site), []
        for number, gate in enumerate(gates):
            sensor = shared.get(number)
            if sensor is None:
                spot = Spot(layer.name, layer.index, len(layers), order, len(members))
                name = f"{key}.{number}.{layer.name}"
                sensor = Sensor(gate, name, spot, site_width(module, layer), site_device(module))
                masters.add_module(f"gate{number}", sensor)
            sensors.append(sensor)
        masters.gating = Gating(edit.gate, key, sensors)


def _sensor_elsewhere(gate, key, edit, members, layers):
    site, found = gate.site or edit.site, _find(gate.layer, layers)
    if len(found) > 1:
        raise ValueError(f"a gate measures at one layer, but {gate.layer!r} names {len(found)}")
    layer = found[0]
    module = layer.at(site)
    if module is None:
        raise ValueError(f"a gate measures at site {site!r} of layer {layer.name}, which has no such site")
    for other, _ in members:
        if layer.name.partition(".")[0] != other.name.partition(".")[0]:
            raise ValueError(f"a gate at layer {layer.name} cannot decide for layer {other.name}: another stack's tokens")
        if not _precedes(layer, site, other, edit.site):
            raise ValueError(
                f"a gate measures at site {site!r} of layer {layer.name}, which comes after site {edit.site!r} of layer "
                f"{other.name}, where its edit acts: measure at an earlier layer, or leave {other.name} out of layers="
            )
    spot = Spot(layer.name, layer.index, len(layers))
    return Sensor(gate, key, spot, site_width(module, layer), site_device(module), layer, site)


def _precedes(layer, site, other, other_site):
    """Whether one place is passed before another, or is the same; not known of sites beside attn, mlp and block."""
    if layer.index != other.index or site == other_site:
        return layer.index <= other.index
    return {site, other_site} <= set(_IN_ORDER) and _IN_ORDER.index(site) < _IN_ORDER.index(other_site)


def choose(edit, layers):
    """The layers an edit acts on, in the order it names them."""
    if edit.layers is None:
        chosen = [layer for layer in layers if layer.at(edit.site) is not None]
        if not chosen:
            raise ValueError(_no_site(edit, layers[0]))
        return chosen
    chosen = []
    for wanted in edit.layers:
        chosen += [layer for layer in _find(wanted, layers) if layer not in chosen]
    for layer in chosen:
        if layer.at(edit.site) is None:
            raise ValueError(_no_site(edit, layer))
    return chosen


def _find(wanted, layers):
    """The layers that a number or a name means."""
    if isinstance(wanted, str):
        found = [layer for layer in layers if wanted in (layer.name, layer.name.partition(".")[0])]
    else:
        found = [layers[wanted]] if -len(layers) <= wanted < len(layers) else []
    if not found:
        names = f"{layers[0].name} to {layers[-1].name}"
        raise ValueError(f"there is no layer {wanted!r}: the model has {len(layers)} layers, {names}")
    return found


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
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return device if device is not None else next(module.parameters()).device
