"""Merging a handle's edits into the weights of the linear maps they follow, and back (docs/design.md, 3).

    W' = diag(s) W + writeᵀ (read W)        m' = s ⊙ m + bias + (m @ readᵀ + offset) @ write

(for q, k and v of a fused projection on their rows of it; for `ffn_in`, on the other side, form.merge_input; for `embed` on
each row of the table, and for a vector at `block` on the FFN's last map, where that is proved: merged_places.py), computed in
float64 and rounded once to the weight's dtype. Exact in real numbers, not in bf16: with s = 1 ± 1e-3 not one bf16 weight
changes. So the rounding is measured, and a merge that would lose more than LIMIT of the edit is refused, or those layers are
kept in fp32 where the caller asks for it.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import nn

from ..edits.form import Form, at_strength, fold_all, merge, merge_input
from ..families import Input, Part, mixture, submodule
from ..families.own_class import base_of
from .merged_places import map_behind_block, table_behind_embed

LIMIT = 0.02  # of the edit, as the change it makes to outputs for inputs of unit variance


@dataclass
class _Place:
    """Where a stack of edits is merged. at: the site of the map that takes them; None for the table of embeddings."""

    layer: object
    site: str
    masters: list
    at: str | None
    module: nn.Module


class MergeError(ValueError):
    """This edit cannot be merged. The message says why and what to do."""


class Merged:
    """What a merge changed. `undo` restores it, from the last change to the first."""

    def __init__(self):
        self.parameters = []  # (module, name, Parameter or None, its data)
        self.flags = []  # (config, name, value)
        self.hooks = []
        self.rounding = {}  # layer name → share of the edit that rounding lost

    def set(self, module, name, data):
        """Put new data into a parameter, which stays the same object. A missing parameter is made."""
        parameter = module._parameters[name]
        self.parameters.append((module, name, parameter, None if parameter is None else parameter.data))
        if parameter is None:
            module._parameters[name] = nn.Parameter(data, requires_grad=module.weight.requires_grad)
        else:
            _replace(parameter, data)

    def undo(self):
        for hook in self.hooks:
            hook.remove()
        for config, name, value in self.flags:
            setattr(config, name, value)
        for module, name, parameter, data in reversed(self.parameters):
            module._parameters[name] = parameter
            if parameter is not None:
                _replace(parameter, data.to(parameter.device))


def _replace(parameter, data):
    """Another content for a parameter, which the backward of a forward before it finds by its version."""
    parameter.data = data
    torch.autograd.graph.increment_version(parameter)


class _CastIn:
    """Forward pre-hook: a layer kept in fp32 takes rows of any dtype."""

    def __call__(self, module, args):
        return (args[0].to(module.weight.dtype), *args[1:])


class _CastOut:
    """Forward hook: a layer kept in fp32 returns rows in the model's dtype."""

    def __init__(self, dtype):
        self.dtype = dtype

    def __call__(self, module, args, output):
        return output.to(self.dtype)


def merge_handle(handle, fp32):
    """Merge every edit of a handle. Returns the Merged that undoes it. Raises MergeError with the model unchanged."""
    if handle.tenancy is not None:
        raise MergeError(
            f"this handle holds {handle.tenancy.count} tenants, and weights can hold one edit: patch a model with "
            "one tenant's edit, such as handle.tenant(0), and merge that"
        )
    stacks = {}
    for edit, layer, masters in handle._each():
        stacks.setdefault((layer, edit.site), []).append(masters)
    places = [_check(handle, layer, site, masters) for (layer, site), masters in stacks.items()]
    places.sort(key=lambda place: place.site == "block")  # behind what the map that takes it is edited by itself
    merged = Merged()
    try:
        added = [_merge_one(merged, place, fp32) for place in places]
        _make_reloadable(merged, handle, {place.at for place, new in zip(places, added, strict=True) if new})
    except BaseException:
        merged.undo()
        raise
    return merged


def _check(handle, layer, site, masters):
    """The _Place of a stack, or a MergeError that says why it has none."""
    where = f"site {site!r} of layer {layer.name}"
    placed = next((m.positions for m in masters if m.positions), None)
    if placed is not None:
        raise MergeError(f"{where}: weights act on every token, this edit on {str(placed)!r}; leave it to run")
    if any(m.gating is not None for m in masters):
        raise MergeError(f"{where}: weights act on every row, a gated edit on some; leave it to run")
    if any(m.keep_norm for m in masters):
        raise MergeError(f"{where}: keep_norm divides by the norm of each row, which no weights do; leave it to run")
    if any(m.is_probe for m in masters):
        raise MergeError(f"{where}: a probe reads and changes nothing, so there is nothing to merge; patch it separately")
    first = handle._root.stack(layer, site)[: len(masters)]
    if any(a is not b for a, b in zip(first, masters, strict=True)):
        raise MergeError(
            f"{where}: another handle's edits, probes or gates come first; merge or remove that handle before this one"
        )
    at, module = _map_of(handle, layer, site, masters, where)
    base = base_of(module)
    if at is not None and not is_linear(base) and not is_conv1d(module):
        of = "input" if isinstance(layer.place(site), Input) else "output"
        if site == "mlp" and (layer.family is mixture.FAMILY or hasattr(module, "experts")):
            raise MergeError(
                f"{where} is the {of} of a mixture of experts ({base.__name__}): its experts' outputs are weighted and "
                "summed, so that no one map follows the whole; leave it to run"
            )
        raise MergeError(
            f"{where} is the {of} of a {base.__name__}, expected a plain nn.Linear or Conv1D: quantized "
            "weights and adapters are not approximated; dequantize, or merge the adapter into its base first"
        )
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.is_meta:
        found = (
            "on the meta device" if weight is not None and weight.is_meta else f"a {type(weight).__name__}"
        )
        dtype = "" if weight is None else f" of {weight.dtype}"
        raise MergeError(
            f"{where}: the weight is {found}{dtype}, expected a plain floating-point Parameter with data"
        )
    if weight.is_inference():
        raise MergeError(f"{where}: the weight was made under torch.inference_mode(), and takes no other data; load it outside")
    holders = sum(p is weight for m in handle.model.modules() for p in m._parameters.values())
    if holders > 1:
        raise MergeError(
            f"{where}: its weight is tied to {holders - 1} other module(s), which would change too; untie it"
        )
    return _Place(layer, site, masters, at, module)


def _map_of(handle, layer, site, masters, where):
    """(site of the map that takes the edits, that map); (None, the table) at `embed`."""
    if site == "final":
        raise MergeError(f"{where}: it follows a norm, or a sum, and not a linear map; leave it to run")
    if site == "embed":
        table, why = table_behind_embed(handle, layer)
        if why is not None:
            raise MergeError(f"{where}: {why}; leave it to run")
        return None, table
    if site == "block":
        site, why = map_behind_block(handle, layer, masters)
        if why is not None:
            raise MergeError(f"{where}: {why}; merge edits on 'mlp', 'attn', 'q', 'k', 'v' or 'ffn_in', or leave this one to run")
    return site, layer.at(site)


def is_linear(base):
    falcon = base.__name__ == "FalconLinear" and base.__module__.startswith("transformers.")  # x @ Wᵀ, then + bias
    return issubclass(base, nn.Linear) and (base.forward is nn.Linear.forward or falcon)


def is_conv1d(module):
    """GPT-2's linear map, which stores Wᵀ."""
    return base_of(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int)


def _merge_one(merged, place, fp32):
    """Merge a stack into its linear map, or into the table; whether that gained a bias."""
    layer, site, masters, module = place.layer, place.site, place.masters, place.module
    transposed = is_conv1d(module)
    weight, bias = module.weight, module._parameters.get("bias")
    with torch.inference_mode(False), torch.no_grad():
        form = fold_all([at_strength(_wide(m.form()), m.strength) for m in masters])
        old, old_bias = weight.data.double(), None if bias is None else bias.data.double()
        if place.at is None:
            new, new_bias = form(old), None
        else:
            new, new_bias = _with_form(form, layer, place.at, old.T if transposed else old, old_bias)
            new = new.T if transposed else new
        if old_bias is None and new_bias is not None and not new_bias.any():
            new_bias = None
        change = _size(new - old, new_bias, old_bias)
        dtype = weight.dtype
        lost = _lost(new, new_bias, dtype, change)
        if lost > LIMIT and fp32 and place.at is not None:
            dtype, lost = torch.float32, _lost(new, new_bias, torch.float32, change)
        if lost > LIMIT:
            advice = (
                "leave it to run"
                if fp32 or place.at is None
                else "merge(fp32=True) keeps such layers in float32, or leave it to run"
            )
            raise MergeError(
                f"site {site!r} of layer {layer.name}: rounding to {dtype} would lose {100 * lost:.1f} % "
                f"of the edit, more than {100 * LIMIT:.0f} %; {advice}"
            )
        merged.rounding[layer.name] = max(lost, merged.rounding.get(layer.name, 0.0))
        if dtype is not weight.dtype:
            merged.hooks.append(module.register_forward_pre_hook(_CastIn()))
            merged.hooks.append(module.register_forward_hook(_CastOut(weight.dtype)))
        merged.set(module, "weight", new.to(dtype).contiguous())
        if new_bias is not None:
            merged.set(module, "bias", new_bias.to(dtype))
    return bias is None and new_bias is not None


def _with_form(form, layer, site, weight, bias):
    """(weight', bias') of a linear map with a form at its site: after it, on some of its outputs, or before it."""
    place = layer.place(site)
    if isinstance(place, Input):
        return merge_input(form, weight, bias)
    if not isinstance(place, Part):
        return merge(form, weight, bias)
    groups, start, stop = place.columns(layer.module, len(weight))
    rows = torch.arange(len(weight), device=weight.device).view(groups, -1)[:, start:stop].flatten()
    part, part_bias = merge(form, weight[rows], None if bias is None else bias[rows])
    if part_bias is not None:
        bias = (weight.new_zeros(len(weight)) if bias is None else bias).index_copy(0, rows, part_bias)
    return weight.index_copy(0, rows, part), bias


def _wide(form):
    return Form(*(None if t is None else t.detach().double() for t in form.tensors()))


def _size(weight, bias, old_bias=None):
    """Norm of the change in outputs for a change of weight and bias, with inputs of unit variance."""
    total = weight.square().sum()
    if bias is not None:
        total = total + (bias if old_bias is None else bias - old_bias).square().sum()
    return float(total.sqrt())


def _lost(weight, bias, dtype, change):
    error = _size(
        weight.to(dtype).double() - weight, None if bias is None else bias.to(dtype).double() - bias
    )
    return error / change if change else 0.0


def _make_reloadable(merged, handle, sites):
    """If biases were added: set the config's flag for them, and add zeros wherever else the flag implies a bias."""
    for site in sites:
        layers = handle._root.layers
        flag, paths = layers[0].family.biases.get(site, (None, ()))
        config = getattr(handle.model, "config", None)
        linears = [submodule(layer.module, path) for layer in layers for path in paths]
        if (
            flag is None
            or not isinstance(getattr(config, flag, None), bool)
            or any(m is None for m in linears)
        ):
            warnings.warn(
                f"merging gave the linear maps at {site!r} a bias that {type(handle.model).__name__} has no "
                "setting for: the model runs with it, but save_pretrained and from_pretrained would lose it; "
                "save the edit itself (handle.save) instead",
                stacklevel=4,
            )
            continue
        merged.flags.append((config, flag, getattr(config, flag)))
        setattr(config, flag, True)
        for linear in linears:
            if linear._parameters.get("bias") is None:
                merged.set(linear, "bias", linear.weight.data.new_zeros(linear.weight.shape[0]))
