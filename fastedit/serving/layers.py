"""How edits get into vLLM's layers: the class of a norm, or of a module whose output is edited, is swapped.

vLLM fuses the residual add into the following norm in some models: norm(x, residual) → (normed, residual). There our op
replaces that call: edit, add and norm in one pass. The first norm of layer i + 1, or the model's last norm, makes the
add of layer i's FFN. So that norm carries layer i's `mlp` (on x) and `block` (on the sum). If a layer does its own add
(GPT-2, OPT) or norms before it adds (Gemma 2 and 3), the edit runs on the module's output.

To torch.compile each place is one operator that knows only its name. Tables, slots and weights are looked up when it
runs, so none of them is in a compiled graph or its cache.
"""

import functools
import typing
from dataclasses import dataclass

import torch
from torch import nn

from .. import ops

PLACE, _BASE = "_fastedit_place", "_fastedit_serving_base"


@dataclass(frozen=True)
class Structure:
    """Where a decoder layer's sites are.

    attn, mlp: the modules whose outputs are the sites'. adds: {"attn" or "block": the norm that makes the add}: "attn"
    is the add of the attention within the layer, "block" that of the layer before. Empty: edits run on outputs.
    on_outputs: sites that do so although their add is fused, because a norm stands between.
    """

    attn: str = "self_attn"
    mlp: str = "mlp"
    adds: tuple = (("attn", "post_attention_layernorm"), ("block", "input_layernorm"))
    on_outputs: tuple = ()


PRE_NORM = Structure()
SANDWICH = Structure(adds=(("attn", "pre_feedforward_layernorm"), ("block", "input_layernorm")), on_outputs=("attn", "mlp"))
STRUCTURES = {
    "LlamaDecoderLayer": PRE_NORM, "MistralDecoderLayer": PRE_NORM, "Qwen2DecoderLayer": PRE_NORM,
    "Qwen3DecoderLayer": PRE_NORM, "GemmaDecoderLayer": PRE_NORM,
    "Gemma2DecoderLayer": SANDWICH, "Gemma3DecoderLayer": SANDWICH,
    "GPT2Block": Structure(attn="attn", adds=()), "OPTDecoderLayer": Structure(mlp="fc2", adds=()),
}  # fmt: skip
NORMS = {"RMSNorm": "rms", "GemmaRMSNorm": "gemma"}


class Place:
    """The edits at one add, or on one output: the tables of its sites and the rows of the step."""

    def __init__(self, name, rows, tables, on_x=None, on_sum=None, norm=None):
        self.name, self.rows, self.norm = name, rows, norm
        self.on_x = None if on_x is None else tables.tensors(*on_x)
        self.on_sum = None if on_sum is None else tables.tensors(*on_sum)
        self.gate_x, self.gate_sum = _gate(tables, on_x), _gate(tables, on_sum)
        self.kind = None if norm is None else NORMS[_own_class(norm).__name__]

    def edit(self, x):
        """The module's output under its edits."""
        rows = self.rows
        if not rows.edited and x.is_cpu:
            return x
        count = x.shape[0]
        return ops.edit(x, *self.on_x, slot=rows.slot[:count], strength=rows.strength[:count], **self.gate_x)

    def add_norm(self, x, residual):
        """(normed, residual') as vLLM's fused norms return them."""
        rows, norm = self.rows, self.norm
        form, on, where = (None,) * 5, "x", {}
        if rows.edited or not x.is_cpu:  # a captured graph must hold the edit, whatever its first step asks for
            count = x.shape[0]
            where = {"slot": rows.slot[:count], "strength": rows.strength[:count]}
            if self.on_x is not None and self.on_sum is not None:
                x = ops.edit(x, *self.on_x, **where, **self.gate_x)
            form, on, gate = (self.on_x, "x", self.gate_x) if self.on_sum is None else (self.on_sum, "sum", self.gate_sum)
            where |= gate
        residual, normed = ops.edit_add_norm(
            x, residual, norm.weight, *form, kind=self.kind, eps=norm.variance_epsilon, on=on, **where
        )
        return normed, residual


def _gate(tables, place):
    found = None if place is None else tables.gate(*place)
    return {} if found is None else {"gate": found[0], "rule": found[1]}


class Serving:
    """The places of the model that runs now, which the operators look up. One engine runs at a time in a process."""

    places: typing.ClassVar = {}


_library = torch.library.Library("fastedit_serving", "DEF")
_library.define("add_norm(Tensor x, Tensor residual, str place) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
_library.define("edit(Tensor x, str place) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _run_add_norm(x, residual, place):
    return Serving.places[place].add_norm(x, residual)


def _run_edit(x, place):
    edited = Serving.places[place].edit(x)
    return edited.clone() if edited is x else edited  # an operator must not return what it was given


_library.impl("add_norm", _run_add_norm, "CompositeExplicitAutograd")
_library.impl("edit", _run_edit, "CompositeExplicitAutograd")
torch.library.register_fake(
    "fastedit_serving::add_norm", lambda x, residual, place: (torch.empty_like(x), torch.empty_like(x)), lib=_library
)
torch.library.register_fake("fastedit_serving::edit", lambda x, place: torch.empty_like(x), lib=_library)


def _norm_forward(base):
    def forward(self, x, residual=None):
        if residual is None:
            return base.forward(self, x)
        place = getattr(self, PLACE)
        if torch.compiler.is_compiling():
            return torch.ops.fastedit_serving.add_norm(x, residual, place.name)
        return place.add_norm(x, residual)

    return forward


def _output_forward(base):
    def forward(self, *args, **kwargs):
        output = base.forward(self, *args, **kwargs)
        place = getattr(self, PLACE)
        hidden = output[0] if isinstance(output, tuple) else output
        if torch.compiler.is_compiling():
            edited = torch.ops.fastedit_serving.edit(hidden, place.name)
        else:
            edited = place.edit(hidden)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    return forward


@functools.cache
def _swapped(base, make):
    members = {"forward": make(base), "__module__": base.__module__, "__qualname__": base.__qualname__, _BASE: base}
    return type(base.__name__, (base,), members)


def _own_class(module):
    return type(module).__dict__.get(_BASE, type(module))


def _swap(module, make, place):
    module.__class__ = _swapped(_own_class(module), make)
    module.__dict__[PLACE] = place


def find_layers(model):
    """(the module that holds the decoder layers, their ModuleList, the Structure).

    Raises:
        ValueError: no such layers, with the classes that are served.
    """
    for holder in model.modules():
        for layers in holder.children():
            if not isinstance(layers, nn.ModuleList):
                continue
            for layer in layers:
                found = next((STRUCTURES[c.__name__] for c in type(layer).__mro__ if c.__name__ in STRUCTURES), None)
                if found is not None:
                    return holder, layers, found
    raise ValueError(
        f"fastedit finds no decoder layers that it knows in {type(model).__name__}; it serves {', '.join(STRUCTURES)}"
    )


def attach(model, sites, rows, tables):
    """Put the sites' places into the model's layers. Returns {name: Place}. Layers of other ranks are left out.

    Raises:
        ValueError: a layer that is built differently from what its class says. Nothing has changed.
    """
    holder, layers, structure = find_layers(model)
    adds = dict(structure.adds)
    swaps = []

    def carry(name, norm, on_x, on_sum):
        if on_x is not None or on_sum is not None:
            _check_norm(name, norm)
            swaps.append((norm, _norm_forward, Place(name, rows, tables, on_x, on_sum, norm)))

    def on_output(name, module, site):
        if site is not None:
            swaps.append((module, _output_forward, Place(name, rows, tables, on_x=site)))

    def site_of(index, site, riding):
        rides = bool(adds) and site not in structure.on_outputs
        return (str(index), site) if site in sites and rides == riding else None

    here = [(index, layer) for index, layer in enumerate(layers) if any(c.__name__ in STRUCTURES for c in type(layer).__mro__)]
    for index, layer in here:
        if adds:
            carry(f"{index}.attn", getattr(layer, adds["attn"]), site_of(index, "attn", True), None)
            if index:
                before = site_of(index - 1, "mlp", True), site_of(index - 1, "block", True)
                carry(f"{index - 1}.block", getattr(layer, adds["block"]), *before)
        else:
            on_output(f"{index}.block", layer, site_of(index, "block", False))
        on_output(f"{index}.attn output", getattr(layer, structure.attn), site_of(index, "attn", False))
        on_output(f"{index}.mlp output", getattr(layer, structure.mlp), site_of(index, "mlp", False))
    last = len(layers) - 1
    if adds and here and here[-1][0] == last:
        carry(f"{last}.block", holder.norm, site_of(last, "mlp", True), site_of(last, "block", True))
    for module, make, place in swaps:
        _swap(module, make, place)
    return {place.name: place for _, _, place in swaps}


def _check_norm(name, norm):
    kind = _own_class(norm).__name__
    if kind not in NORMS or getattr(norm, "variance_size_override", None) is not None or norm.weight is None:
        raise ValueError(f"fastedit: the norm at {name} is {kind}, expected one of {', '.join(NORMS)} over the whole width")
