"""From declarative edits to masters for every layer. Everything that can fail fails here, before the model is
touched."""

import itertools

from ..edits.per_layer import Spot
from ..edits.sites import MODEL_SITES
from ..families import Input, Part, near_misses, outputs_of
from .masters import join, masters_of
from .rows.gate_sensors import Gating, Sensor

_PASSED = {"embed": 0, "q": 1, "k": 1, "v": 1, "attn": 2, "ffn_in": 3, "mlp": 4, "block": 5, "final": 6}  # in a layer
_numbers = itertools.count()  # what a gate decided must never be taken for another's


def plan(edit, layers, tenancy=None):
    """[(layer, Masters)] of one edit.

    Raises:
        ValueError: a layer or site that does not exist, or a width that does not fit.
    """
    chosen = choose(edit, layers)
    members = []
    for order, layer in enumerate(chosen):
        spot = Spot(layer.name, layer.index, len(layers), order, len(chosen), edit.site in MODEL_SITES)
        members.append((layer, masters_of(edit, spot, width_at(layer, edit.site), device_at(layer, edit.site), tenancy)))
    join(masters for _, masters in members)
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
        sensors = []
        for number, gate in enumerate(gates):
            sensor = shared.get(number)
            if sensor is None:
                spot = Spot(layer.name, layer.index, len(layers), order, len(members))
                name = f"{key}.{number}.{layer.name}"
                sensor = Sensor(gate, name, spot, width_at(layer, edit.site), device_at(layer, edit.site))
                masters.add_module(f"gate{number}", sensor)
            sensors.append(sensor)
        masters.gating = Gating(edit.gate, key, sensors)


def _sensor_elsewhere(gate, key, edit, members, layers):
    site, found = gate.site or edit.site, find(gate.layer, layers)
    if len(found) > 1:
        raise ValueError(f"a gate measures at one layer, but {gate.layer!r} names {len(found)}")
    layer = found[0]
    if layer.at(site) is None:
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
    return Sensor(gate, key, spot, width_at(layer, site), device_at(layer, site), layer, site)


def _precedes(layer, site, other, other_site):
    """Whether a forward passes one place before the other, or they are the same."""
    if layer.index != other.index or site == other_site:
        return layer.index <= other.index
    return _PASSED[site] < _PASSED[other_site]


def choose(edit, layers):
    """The layers that an edit acts on, in the order in which it names them."""
    if edit.site in MODEL_SITES:
        return _choose_of_model(edit, layers)
    if edit.layers is None:
        there = [layer for layer in layers if layer.at(edit.site) is not None]
        missed = [layer for layer in layers if layer.at(edit.site) is None]
        if missed:
            raise ValueError(_no_site(edit, missed[0]) + (_instead(missed, there) if there else ""))
        return there
    chosen = []
    for wanted in edit.layers:
        chosen += [layer for layer in find(wanted, layers) if layer not in chosen]
    for layer in chosen:
        if layer.at(edit.site) is None:
            raise ValueError(_no_site(edit, layer))
    return chosen


def _choose_of_model(edit, layers):
    """The layers that hold a site of the model: all of them, or those of the stacks or layers named."""
    holders = [layer for layer in layers if layer.at(edit.site) is not None]
    if not holders:
        raise ValueError(_no_site(edit, layers[-1]))
    if edit.layers is None:
        return holders
    numbers = []
    for wanted in edit.layers:
        numbers += range(*wanted.indices(len(layers))) if isinstance(wanted, slice) else [wanted]
    there = {layer.index for layer in holders}
    stacks = {layer.name.partition(".")[0] for layer in holders}
    for wanted in numbers:
        index = wanted + len(layers) if isinstance(wanted, int) and wanted < 0 else wanted
        if index not in there and wanted not in stacks and wanted not in [layer.name for layer in holders]:
            names = ", ".join(layer.name for layer in holders)
            raise ValueError(
                f"site {edit.site!r} is one of the model, not of layer {wanted!r}: leave layers= out (its tensors "
                f"are kept with {names}; a vector for each layer does not go there either)"
            )
    return [
        layer for layer in holders
        if {layer.index, layer.index - len(layers), layer.name, layer.name.partition(".")[0]} & set(numbers)
    ]  # fmt: skip


_WHY = {
    "attn": "no linear map there is unmistakably its last one",
    "mlp": "no linear map there is unmistakably its last one",
    "ffn_in": "its FFN has no single last linear map, or none that is unmistakably so",
    "final": "what follows the last layer is not known",
}


def find(wanted, layers):
    """The layers that a number or a name means."""
    if isinstance(wanted, slice):
        found = list(layers[wanted])
    elif isinstance(wanted, str):
        found = [layer for layer in layers if wanted in (layer.name, layer.name.partition(".")[0])]
    else:
        found = [layers[wanted]] if -len(layers) <= wanted < len(layers) else []
    if not found:
        names = f"{layers[0].name} to {layers[-1].name}"
        raise ValueError(f"there is no layer {wanted!r}: the model has {len(layers)} layers, {names}")
    return found


def _no_site(edit, layer):
    found = ", ".join(repr(site) for site in layer.sites())
    why = _WHY.get(edit.site, "no linear map there is known for it")
    return (
        f"site {edit.site!r} was not found in {type(layer.module).__name__} (layer {layer.name}): {why}; "
        f"found {found}{near_misses(layer.module)}. fastedit.families.register says where it is"
    )


def _instead(missed, there):
    """What to do about layers that do not have a site."""
    names, numbers = ", ".join(layer.name for layer in missed), [layer.index for layer in there]
    share = f"{len(missed)} of {len(missed) + len(there)}"
    return f". It would leave out {share} layers ({names}): say layers={numbers} to leave them out"


def width_at(layer, site):
    """How wide the hidden states are at a site of a layer.

    Raises:
        ValueError: the width was not found, or a fused projection's layout is not known.
    """
    place, module = layer.place(site), layer.at(site)
    if isinstance(place, Part):
        groups, start, stop = place.columns(layer.module, site_width(module, layer))
        return groups * (stop - start)
    if isinstance(place, Input) and place.path:
        return input_width(module, layer)
    return site_width(module, layer)


def input_width(module, layer):
    """How many inputs a linear map takes."""
    if isinstance(getattr(module, "in_features", None), int):
        return module.in_features
    if isinstance(getattr(module, "nf", None), int):  # GPT-2's Conv1D stores Wᵀ
        return module.weight.shape[0]
    raise ValueError(f"the input width of {type(module).__name__} in layer {layer.name} was not found")


def site_width(module, layer):
    """How wide the hidden states at a site are: a linear map's outputs, else the residual stream's width.

    That is what the layer was seen to hand on, if the model's config says the same; else the config's, checked against the
    layer's own maps and norms and the embedding.

    Raises:
        ValueError: the config gives no width and the layer has no linear map, or they contradict each other.
    """
    if outputs_of(module) is not None:
        return outputs_of(module)
    said = layer.width
    if layer.handed is not None and said in (None, layer.handed):
        return layer.handed
    ends = layer.ends()
    if said is None:
        found = ends or _commonest(layer.module)
    else:
        if not any(said in p.shape for p in layer.module.parameters()):
            raise ValueError(
                f"the width of layer {layer.name} is not known: the model's config says {said}, and no weight of "
                f"{type(layer.module).__name__} has such a side; its maps into the stream say {sorted(ends) or 'nothing'}"
            )
        doubted = said not in ends if ends else layer.embedded is not None
        found = {said} if not doubted or said == layer.embedded else ends or {said, layer.embedded}
    if len(found) != 1:
        raise ValueError(
            f"the width of layer {layer.name} was not found: looked for one number in the model's config, its embedding and the "
            f"linear maps and norms of {type(layer.module).__name__}, found {sorted(found) or 'none'}"
        )
    return found.pop()


def _commonest(module):
    """{the commonest length of a vector}, for a module that is not a transformers model: its norms have that length."""
    widths = [p.shape[0] for p in module.parameters() if p.dim() == 1]
    return {max(set(widths), key=widths.count)} if widths else set()


def device_at(layer, site):
    """The device of the weights at a site. If accelerate offloads them, the device on which it will run."""
    module = layer.at(site)
    held = next(module.parameters(), None)  # a norm may have none
    found = (next(layer.module.parameters()) if held is None else held).device
    if found.type != "meta" and "_hf_hook" not in module.__dict__:
        return found
    hooks = (m.__dict__.get("_hf_hook") for m in module.modules())
    running = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((device for device in running if device is not None), found)
