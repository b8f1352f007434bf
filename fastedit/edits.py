"""Edits: declarative objects saying what to do to hidden states h, at which site of which layers.

Every edit is an instance of the normal form of DESIGN.md 2,

    h' = h + c · ((scale − 1) ⊙ h + bias + (h @ readᵀ + offset) @ write),

and all an edit does is write down those tensors for a layer. `fastedit.patch` copies them into fp32
masters on the model; the edit object itself is never changed and may be used again.

Arguments that all edits take:
    site: "mlp", "attn", "block", "q", "k", "v", "ffn_in", "embed" or "final" (fastedit/sites.py).
    layers: None for every layer (the one choice for "embed" and "final", which are of the model), or layer
        numbers: an int, a range, a list; negative ones count from the end. A model with two stacks is numbered
        through, encoder first; "decoder" or "decoder.3" also work.
    positions: which tokens, as fastedit/positions.py lists: None or "all", "prompt", "generated", "first 4", "last 4", …
    strength: c, a number; `handle.strength` multiplies it at run time.
    keep_norm: scale each edited row back to the length it had: h'·‖h‖/‖h'‖. Such an edit rides on no add.

`edit.when(gate)` is the same edit behind a gate (gates.py).

A value that may differ by layer is one tensor for all layers, a tensor with a leading layer dimension (as
many as the model has layers, or as the edit names), or a mapping from layer number to tensor (or an object
with one, as `directions` or `vectors`).
"""

import copy
import math
from collections.abc import Iterable

import torch

from .checks import MAX_RANK
from .form import Form
from .gates import check_rule, rule_of
from .per_layer import PerLayer
from .positions import positions as as_positions
from .sites import check_site
from .turning import turn, turned, turned_back, turned_form

TENSORS = ("scale", "bias", "read", "offset", "write")


class Edit:
    """What all edits share: where they act and how strongly. A subclass gives a layer's tensors (`values`).

    names: the tensors it has. rank: of its low-rank part, 0 for none.
    """

    default_site = "block"
    trainable = False
    allowed_names = TENSORS
    options = ()  # attributes that config() records besides the tensors
    derive = None  # where the masters are not the normal form's own tensors: {name: tensor} → those five
    pull_back = None  # … and its transpose: (masters, gradients of the five) → {name: gradient}
    held = None  # {layer number: {name: tensor}} in place of `values`
    constrained = None  # the master whose rows are kept orthonormal (orthonormal.py)
    is_probe = False
    stage = None  # the class of what runs it (runtime.py), for an edit that is no normal form
    gate = None  # a gates.Rule

    def __init__(self, names, rank=0, *, site=None, layers=None, positions=None, strength=1.0, keep_norm=False):
        self.site = check_site(self.default_site if site is None else site)
        self.layers = _check_layers(layers)
        self.positions = as_positions(positions)
        if rank > MAX_RANK:
            raise ValueError(f"{type(self).__name__} has rank {rank}, but the kernels take up to {MAX_RANK}")
        self.strength, self.names, self.rank = _number("strength", strength), tuple(names), rank
        if not isinstance(keep_norm, bool):
            raise TypeError(f"keep_norm is {keep_norm!r}, expected True or False")
        self.neutral, self.keep_norm = False, keep_norm

    def when(self, gate):
        """The same edit where a gate says so: a fastedit.Gate, or several combined by &, | and ~.

        Behind a gate already, it is behind both. h' = h + c · g · (…), g one number a row.
        """
        gated = copy.copy(self)
        gated.gate = check_rule(gate) if self.gate is None else self.gate & gate
        return gated

    def values(self, spot, width):
        """{name: fp32 tensor on the CPU} for a layer."""
        raise NotImplementedError

    def tensors(self, spot, width):
        """`values`, checked; for an edit rebuilt from its config, tensors that change nothing."""
        if self.neutral:
            return {name: self.neutral_tensor(name, width) for name in self.names}
        found = self.values(spot, width) if self.held is None else self.held[spot.index]
        for name, tensor in found.items():
            if name not in ("offset", "angle") and tensor.shape[-1] != width:
                raise ValueError(
                    f"{type(self).__name__}: {name} has width {tensor.shape[-1]}, but site {self.site!r} of "
                    f"layer {spot.name} is {width} wide"
                )
        return found

    @staticmethod
    def form(masters):
        """The normal form from an edit's masters {name: tensor}, differentiably."""
        return Form(**masters)

    def neutral_tensor(self, name, width):
        """What a tensor is where the edit changes nothing."""
        return _neutral(name, self.rank, width)

    def shape(self, name, width):
        """Of one of its tensors."""
        vectors = {"scale": (width,), "bias": (width,), "offset": (self.rank,), "angle": (1,)}
        return vectors.get(name, (self.rank, width))

    def holding(self, values):
        """The same edit with other tensors: {layer number: {name: tensor}}, for those layers."""
        held = copy.copy(self)
        held.layers, held.neutral, held.held = tuple(values), False, values
        return held

    def check(self):
        """Raise ValueError for options, read from a file, that make no sense."""

    def config(self):
        """A JSON-able description; with the tensors of `Handle.named_tensors` it is the whole edit."""
        described = {
            "kind": type(self).__name__, "site": self.site,
            "layers": None if self.layers is None else list(self.layers),
            "positions": "all" if self.positions is None else self.positions.spec(),
            "strength": self.strength, "rank": self.rank, "tensors": list(self.names), "trainable": self.trainable,
        }  # fmt: skip
        described |= {"keep_norm": True} if self.keep_norm else {}
        described |= {} if self.gate is None else {"gate": self.gate.spec()}
        return described | {name: getattr(self, name) for name in self.options}

    def __repr__(self):
        shown = {"site": self.site, "layers": self.layers, "strength": self.strength}
        shown |= {} if self.positions is None else {"positions": str(self.positions)}
        shown |= {"rank": self.rank} if self.rank else {}
        shown |= {"keep_norm": True} if self.keep_norm else {}
        shown |= {} if self.gate is None else {"gate": str(self.gate)}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in shown.items())})"


class ScaleBias(Edit):
    """h' = scale ⊙ h + bias: RED (arXiv 2402.15179, Eq. 3), and with scale alone (IA)³ on outputs.

    scale, bias: values (width,), None for the identity (ones, zeros), or False for none at all.
    trainable: True by default.
    """

    default_site = "mlp"
    trainable = True

    def __init__(self, scale=None, bias=None, *, trainable=True, **where):
        self.given = {
            name: None if value is None else PerLayer(name, value, (1,))
            for name, value in (("scale", scale), ("bias", bias))
            if value is not False
        }
        if not self.given:
            raise ValueError("scale and bias are both False: nothing is left of the edit")
        self.trainable = bool(trainable)
        super().__init__(self.given, **_layers_of(where, *self.given.values()))

    def values(self, spot, width):
        return {n: _neutral(n, 0, width) if v is None else v.at(spot) for n, v in self.given.items()}


class RED(ScaleBias):
    """Representation editing (arXiv 2402.15179, Eq. 3): trainable scale (ones) and bias (zeros) on the FFN's
    output of every layer, 2 · width parameters a layer.
    """


class Steer(Edit):
    """h' = h + c · v: steering and control vectors, CAA, ActAdd, RepE.

    vectors: values (width,).
    """

    def __init__(self, vectors, **where):
        self.vectors = PerLayer("vectors", vectors, (1,))
        super().__init__(("bias",), **_layers_of(where, self.vectors))

    def values(self, spot, width):
        return {"bias": self.vectors.at(spot)}


class Ablate(Edit):
    """h' = h − Σ (h·v̂) v̂ over an orthonormal basis of the directions' span: directional ablation.

    directions: values (width,) or (k, width), which is k directions at every layer and not one a layer; linearly dependent
        ones count once. One direction a layer: a mapping from layer numbers, or (layers, 1, width).
    """

    def __init__(self, directions, **where):
        bases = PerLayer("directions", directions, (1, 2)).map(orthonormal_rows)
        super().__init__(("read", "write"), rank=max(len(b) for b in bases.all()), **_layers_of(where, bases))
        self.bases = bases

    def values(self, spot, width):
        basis = self.bases.at(spot)
        basis = torch.nn.functional.pad(basis, (0, 0, 0, self.rank - len(basis)))
        return {"read": basis, "write": -basis}


class Clamp(Edit):
    """h' = h + (value − h·v̂) v̂: the component along the unit direction v̂ becomes `value`.

    direction: values (width,), normalised here. value: a number, in units of h.
    """

    options = ("value",)

    def __init__(self, direction, value, **where):
        self.directions, self.value = (
            PerLayer("direction", direction, (1,)).map(orthonormal_rows),
            _number("value", value),
        )
        super().__init__(("read", "offset", "write"), rank=1, **_layers_of(where, self.directions))

    def values(self, spot, width):
        unit = self.directions.at(spot)
        return {"read": unit, "offset": torch.full((1,), -self.value), "write": -unit}


class Amplify(Edit):
    """h' = h + (factor − 1)(h·v̂) v̂: the component along the unit direction v̂ grows by `factor`.

    direction: values (width,), normalised here. factor: a number; 1 changes nothing, 0 ablates.
    """

    options = ("factor",)

    def __init__(self, direction, factor, **where):
        self.directions, self.factor = (
            PerLayer("direction", direction, (1,)).map(orthonormal_rows),
            _number("factor", factor),
        )
        super().__init__(("read", "write"), rank=1, **_layers_of(where, self.directions))

    def values(self, spot, width):
        unit = self.directions.at(spot)
        return {"read": unit, "write": (self.factor - 1) * unit}


class Rotate(Edit):
    """h' = h + z (Rot(angle) − I)ᵀ V, z = h Vᵀ: turn h in a plane (angular steering).

    plane: values (2, width); V is its Gram–Schmidt basis. The turn is from the first row towards the second.
    angle: radians.
    trainable: plane and angle then train, the plane's basis kept orthonormal as LoReFT's (orthonormal.py).
    """

    options = ("angle",)
    allowed_names = (*TENSORS, "plane", "angle")

    def __init__(self, plane, angle, *, trainable=False, **where):
        planes = PerLayer("plane", plane, (2,))
        if any(len(p) != 2 for p in planes.all()):
            raise ValueError(f"plane has {len(planes.all()[0])} rows, expected the 2 directions that span it")
        self.planes, self.angle = planes.map(orthonormal_rows), _number("angle", angle)
        if any(len(p) != 2 for p in self.planes.all()):
            raise ValueError("the plane's two directions are parallel: they span a line, not a plane")
        names = ("plane", "angle") if trainable else ("read", "write")
        super().__init__(names, rank=2, **_layers_of(where, self.planes))
        self.trainable = bool(trainable)

    @property
    def derive(self):
        return turned if "plane" in self.names else None

    @property
    def pull_back(self):
        return turned_back if "plane" in self.names else None

    @property
    def constrained(self):
        return "plane" if "plane" in self.names else None

    @property
    def form(self):
        return turned_form if "plane" in self.names else Edit.form

    def values(self, spot, width):
        basis, angle = self.planes.at(spot), torch.tensor([self.angle], dtype=torch.float64)
        if "plane" in self.names:
            return {"plane": basis, "angle": angle.float()}
        return {"read": basis, "write": (turn(angle) @ basis.double()).float()}

    def neutral_tensor(self, name, width):
        if "plane" not in self.names:
            return super().neutral_tensor(name, width)
        return torch.zeros(1) if name == "angle" else torch.eye(2, width)


class LowRank(Edit):
    """h' = h + (h @ readᵀ + offset) @ write, frozen: any low-rank edit by its factors.

    read, write: values (rank, width). offset: values (rank,), or None for 0.
    """

    def __init__(self, read, offset, write, **where):
        self.given = {"read": PerLayer("read", read, (2,))}
        if offset is not None:
            self.given["offset"] = PerLayer("offset", offset, (1,))
        self.given["write"] = PerLayer("write", write, (2,))
        ranks = {len(t) for n in ("read", "write") for t in self.given[n].all()}
        ranks |= {t.shape[-1] for t in self.given["offset"].all()} if offset is not None else set()
        if len(ranks) != 1:
            raise ValueError(
                f"read, offset and write have ranks {sorted(ranks)}, expected one rank throughout"
            )
        super().__init__(self.given, rank=ranks.pop(), **_layers_of(where, *self.given.values()))

    def values(self, spot, width):
        return {name: value.at(spot) for name, value in self.given.items()}


class DiReFT(Edit):
    """h' = h + W₂ᵀ(W₁ h + c), trainable (arXiv 2404.03592, DiReFT): W₁ = read, c = offset, W₂ = write.

    Starts as the identity in LoRA's way: read random (uniform, ±1/√width), offset and write zero.
    rank: 1 to 64. seed: of the private generator that draws the start; layers differ.
    """

    trainable = True

    def __init__(self, rank, *, seed=0, **where):
        self.seed = seed
        super().__init__(("read", "offset", "write"), rank=_check_rank(rank), **where)

    def values(self, spot, width):
        zeros = torch.zeros(self.rank, width)
        return {"read": _uniform(self, spot, width), "offset": torch.zeros(self.rank), "write": zeros}


class NoReFT(Edit):
    """h' = h + Rᵀ(W h + c − R h), trainable (arXiv 2404.03592, NoReFT: LoReFT without the constraint on R).

    Its masters are source = W, offset = c and write = R, trained apart; the normal form reads W − R.
    Starts as the identity: W = R random (uniform, ±1/√width), c zero.
    rank: 1 to 64. seed: of the private generator that draws the start; layers differ.
    """

    trainable = True
    allowed_names = ("source", "offset", "write")

    def __init__(self, rank, *, seed=0, **where):
        self.seed = seed
        super().__init__(self.allowed_names, rank=_check_rank(rank), **where)

    def values(self, spot, width):
        start = _uniform(self, spot, width)
        return {"source": start, "offset": torch.zeros(self.rank), "write": start.clone()}

    @staticmethod
    def derive(masters):
        return None, None, masters["source"] - masters["write"], masters["offset"], masters["write"]

    @staticmethod
    def pull_back(masters, grads):
        _, _, d_read, d_offset, d_write = grads
        both = d_write if d_read is None else -d_read if d_write is None else d_write - d_read
        return {"source": d_read, "offset": d_offset, "write": both}

    @classmethod
    def form(cls, masters):
        return Form(*cls.derive(masters))


def from_config(configs):
    """Edits rebuilt from configs (`Edit.config`, `Handle.config`), which change nothing until loaded.

    Raises:
        ValueError: an unknown kind, site, tensor or key, by name.
    """
    return [_rebuild(config) for config in configs]


def _rebuild(config):
    from . import control, reft  # noqa: F401, whose kinds are edits too

    kinds = {kind.__name__: kind for kind in _kinds(Edit)}
    kind = kinds.get(config.get("kind"))
    if kind is None:
        raise ValueError(
            f"unknown kind of edit {config.get('kind')!r}; the kinds are {', '.join(sorted(kinds))}"
        )
    where = ("site", "layers", "positions", "strength", "keep_norm")
    known = {"kind", "rank", "tensors", "trainable", "gate", *where, *kind.options}
    unknown = sorted(set(config) - known)
    if unknown:
        raise ValueError(
            f"{kind.__name__}: unknown key {unknown[0]!r} in its config; known are {sorted(known)}"
        )
    names, rank = config.get("tensors"), config.get("rank", 0)
    if not names or not set(names) <= set(kind.allowed_names):
        raise ValueError(
            f"{kind.__name__}: tensors is {names!r}, expected some of {', '.join(kind.allowed_names)}"
        )
    if (
        isinstance(rank, bool)
        or not isinstance(rank, int)
        or rank < 0
        or (rank == 0) != {"read", "write", "plane"}.isdisjoint(names)
    ):
        raise ValueError(f"{kind.__name__}: rank is {rank!r} with tensors {names}")
    edit = object.__new__(kind)
    for name in kind.options:
        setattr(edit, name, config.get(name))
    Edit.__init__(edit, names, rank, **{key: config[key] for key in where if key in config})
    edit.trainable, edit.neutral = bool(config.get("trainable", kind.trainable)), True
    edit.gate = rule_of(config["gate"]) if config.get("gate") is not None else None
    edit.check()
    return edit


def _kinds(cls):
    for kind in cls.__subclasses__():
        yield kind
        yield from _kinds(kind)


def _neutral(name, rank, width):
    if name == "scale":
        return torch.ones(width)
    return torch.zeros({"bias": (width,), "offset": (rank,)}.get(name, (rank, width)))


def _uniform(edit, spot, width):
    generator = torch.Generator().manual_seed(edit.seed * 100_003 + spot.index)
    return (torch.rand(edit.rank, width, generator=generator) * 2 - 1) / width**0.5


def orthonormal_rows(directions):
    """A basis (k, width) of the rows' span, by Gram–Schmidt in float64: the first row keeps its direction."""
    basis = []
    for row in directions.double().reshape(-1, directions.shape[-1]):
        rest = row
        for unit in basis * 2:  # twice is enough for orthogonality to rounding
            rest = rest - (rest @ unit) * unit
        if rest.norm() > 1e-6 * row.norm():
            basis.append(rest / rest.norm())
    if not basis:
        raise ValueError("the directions are all zero: there is nothing to normalise")
    return torch.stack(basis).float()


def _number(name, value):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, expected a finite number")
    return float(value)


def _check_rank(rank):
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise ValueError(f"rank is {rank!r}, expected a whole number from 1 to {MAX_RANK}")
    return rank


def _check_layers(layers):
    """None, or a tuple of layer numbers and names."""
    if layers is None:
        return None
    wanted = (
        (layers,) if isinstance(layers, (int, str)) or not isinstance(layers, Iterable) else tuple(layers)
    )
    for layer in wanted:
        if isinstance(layer, bool) or not isinstance(layer, (int, str)):
            raise TypeError(
                f"layers has {layer!r}, expected None, an int, a range, or a list of ints or layer names"
            )
    if not wanted:
        raise ValueError("layers is empty: the edit would act nowhere; leave it out for every layer")
    return wanted


def _layers_of(where, *values):
    """`where` with layers= taken from a mapping's keys, if it does not say."""
    named = next((v.layers for v in values if v is not None and v.layers is not None), None)
    return where if named is None or where.get("layers") is not None else {**where, "layers": named}
