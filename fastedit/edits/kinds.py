"""Edits: declarative objects that say what to do to hidden states h, at which site of which layers.

Every edit is an instance of the normal form (docs/design.md, 1),

    h' = h + c · ((scale − 1) ⊙ h + bias + (h @ readᵀ + offset) @ write),

and only writes down those tensors for each layer. `fastedit.patch` copies them into fp32 masters on the model. The edit
object itself never changes and may be used again.

What all edits take is described in shared_arguments.py. `edit.when(gate)` is the same edit behind a gate (edits/gates.py).

A value that may differ by layer is one of these: one tensor for all layers; a tensor with a leading layer dimension (as
many as the model has layers, or as the edit names); a mapping from layer number to tensor; or an object that has such a
mapping as `directions` or `vectors`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch

from ..arguments import MAX_RANK, as_layers, as_number, check_flag
from ..hints import Layers, Site, Values, WhichTokens
from .form import Form
from .gates import Rule, check_rule
from .per_layer import PerLayer
from .plane_rotation import turn, turned, turned_back, turned_form
from .positions import positions as as_positions
from .shared_arguments import completed
from .sites import check_site

TENSORS = ("scale", "bias", "read", "offset", "write")


class Edit:
    """What all edits share: where they act and how strongly. A subclass gives the tensors of a layer (`values`).

    Args:
        names: of its tensors. rank: of its low-rank part, 0 to 64.
    """

    default_site: ClassVar[Site] = "block"
    trainable = False
    allowed_names = TENSORS
    options = ()  # attributes that config() records besides the tensors
    derive = None  # where the masters are not the normal form's own tensors: {name: tensor} → those five
    pull_back = None  # … and its transpose: (masters, gradients of the five) → {name: gradient}
    held = None  # {layer number: {name: tensor}} in place of `values`
    constrained = None  # the master whose rows are kept orthonormal (patching/orthonormal_basis.py)
    is_probe = False
    stage = None  # the class of what runs it (patching/site.py), for an edit that is no normal form
    gate = None  # a gates.Rule

    def __init__(
        self, names: Sequence[str], rank: int = 0, *, site: Site | None = None, layers: Layers = None,
        positions: WhichTokens = None, strength: float = 1.0, keep_norm: bool = False,
    ) -> None:  # fmt: skip
        self.site = check_site(self.default_site if site is None else site)
        self.layers = as_layers(layers)
        self.positions = as_positions(positions)
        if rank > MAX_RANK:
            raise ValueError(f"{type(self).__name__} has rank {rank}, but the kernels take up to {MAX_RANK}")
        self.strength, self.names, self.rank = as_number("strength", strength), tuple(names), rank
        self.neutral, self.keep_norm = False, check_flag("keep_norm", keep_norm)

    def __init_subclass__(cls) -> None:
        """Complete the docstring with the arguments that all edits take, so that help() of each kind is whole."""
        super().__init_subclass__()
        cls.__doc__ = completed(cls.__dict__.get("__doc__"), cls.__init__, cls.default_site)

    def when(self, gate: Rule) -> Self:
        """The same edit behind a gate: a fastedit.Gate, or several combined by &, | and ~.

        An edit that has a gate already is then behind both. h' = h + c · g · (…), with one number g per row.
        """
        gated = copy.copy(self)
        gated.gate = check_rule(gate) if self.gate is None else self.gate & gate
        return gated

    def values(self, spot, width):
        """{name: fp32 tensor on the CPU} for a layer."""
        raise NotImplementedError

    def tensors(self, spot, width):
        """`values`, checked. For an edit rebuilt from its config, tensors that change nothing."""
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
        """The normal form from an edit's masters {name: tensor}, differentiable."""
        return Form(**masters)

    def neutral_tensor(self, name, width):
        """The value of a tensor where the edit changes nothing."""
        return _neutral(name, self.rank, width)

    def shape(self, name, width):
        """The shape of one of its tensors."""
        vectors = {"scale": (width,), "bias": (width,), "offset": (self.rank,), "angle": (1,)}
        return vectors.get(name, (self.rank, width))

    def holding(self, values):
        """The same edit with other tensors: {layer number: {name: tensor}}, for those layers."""
        held = copy.copy(self)
        held.layers, held.neutral, held.held = tuple(values), False, values
        return held

    def check(self):
        """Raise ValueError for options from a file that make no sense."""

    def config(self) -> dict[str, Any]:
        """A JSON-able description. With the tensors of `Handle.named_tensors` it is the whole edit."""
        described = {
            "kind": type(self).__name__, "site": self.site,
            "layers": None if self.layers is None else [n if isinstance(n, (int, str)) else str(n) for n in self.layers],
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


Edit.__doc__ = completed(Edit.__doc__, Edit.__init__, "its kind's default")


class ScaleBias(Edit):
    """h' = scale ⊙ h + bias: RED (arXiv 2402.15179, Eq. 3), and with scale alone (IA)³ on outputs.

    Args:
        scale, bias: values (width,), None for the identity (ones, zeros), or False for none at all.
    """

    default_site = "mlp"
    trainable = True

    def __init__(
        self, scale: Values | Literal[False] | None = None, bias: Values | Literal[False] | None = None, *,
        trainable: bool = True, site: Site | None = None, layers: Layers = None,
        positions: WhichTokens = None, strength: float = 1.0, keep_norm: bool = False,
    ) -> None:  # fmt: skip
        self.given = {
            name: None if value is None else PerLayer(name, value, (1,))
            for name, value in (("scale", scale), ("bias", bias))
            if value is not False
        }
        if not self.given:
            raise ValueError("scale and bias are both False: nothing is left of the edit")
        self.trainable = check_flag("trainable", trainable)
        super().__init__(
            self.given, site=site, layers=_layers_of(layers, *self.given.values()), positions=positions,
            strength=strength, keep_norm=keep_norm,
        )  # fmt: skip

    def values(self, spot, width):
        return {n: _neutral(n, 0, width) if v is None else v.at(spot) for n, v in self.given.items()}


class RED(ScaleBias):
    """Representation editing (arXiv 2402.15179, Eq. 3): trainable scale (ones) and bias (zeros) on the FFN's output.

    Acts on every layer, with 2 · width parameters per layer.

    Args:
        scale, bias: values (width,) to start from, None for the identity (ones, zeros), or False for none at all.
    """


class Steer(Edit):
    """h' = h + c · v: steering and control vectors, CAA, ActAdd, RepE.

    Args:
        vectors: v, values (width,), such as fastedit.Directions.
    """

    def __init__(
        self, vectors: Values, *, site: Site | None = None, layers: Layers = None,
        positions: WhichTokens = None, strength: float = 1.0, keep_norm: bool = False,
    ) -> None:  # fmt: skip
        self.vectors = PerLayer("vectors", vectors, (1,))
        super().__init__(
            ("bias",), site=site, layers=_layers_of(layers, self.vectors), positions=positions,
            strength=strength, keep_norm=keep_norm,
        )  # fmt: skip

    def values(self, spot, width):
        return {"bias": self.vectors.at(spot)}


class Ablate(Edit):
    """h' = h − Σ (h·v̂) v̂ over an orthonormal basis of the directions' span: directional ablation.

    Args:
        directions: values (width,) or (k, width), k up to 64. (k, width) means k directions at every layer, not one per
            layer. Linearly dependent directions count once. For one direction per layer pass a mapping from layer
            numbers, or (layers, 1, width).
    """

    def __init__(
        self, directions: Values, *, site: Site | None = None, layers: Layers = None,
        positions: WhichTokens = None, strength: float = 1.0, keep_norm: bool = False,
    ) -> None:  # fmt: skip
        bases = PerLayer("directions", directions, (1, 2)).map(orthonormal_rows)
        super().__init__(
            ("read", "write"), max(len(b) for b in bases.all()), site=site, layers=_layers_of(layers, bases), positions=positions,
            strength=strength, keep_norm=keep_norm,
        )  # fmt: skip
        self.bases = bases

    def values(self, spot, width):
        basis = self.bases.at(spot)
        basis = torch.nn.functional.pad(basis, (0, 0, 0, self.rank - len(basis)))
        return {"read": basis, "write": -basis}


class Clamp(Edit):
    """h' = h + (value − h·v̂) v̂: the component along the unit direction v̂ becomes `value`.

    Args:
        direction: v, values (width,), normalized here. value: a finite number, in units of h.
    """

    options = ("value",)

    def __init__(
        self, direction: Values, value: float, *, site: Site | None = None, layers: Layers = None,
        positions: WhichTokens = None, strength: float = 1.0, keep_norm: bool = False,
    ) -> None:  # fmt: skip
        self.directions, self.value = (
            PerLayer("direction", direction, (1,)).map(orthonormal_rows),
            as_number("value", value),
        )
        super().__init__(
            ("read", "offset", "write"), 1, site=site, layers=_layers_of(layers, self.directions), positions=positions,
            strength=strength, keep_norm=keep_norm,
        )  # fmt: skip

    def values(self, spot, width):
        unit = self.directions.at(spot)
        return {"read": unit, "offset": torch.full((1,), -self.value), "write": -unit}


class Amplify(Edit):
    """h' = h + (factor − 1)(h·v̂) v̂: the component along the unit direction v̂ is multiplied by `factor`.

    Args:
        direction: v, values (width,), normalized here. factor: a finite number. 1 changes nothing, 0 ablates.
    """

    options = ("factor",)

    def __init__(
        self, direction: Values, factor: float, *, site: Site | None = None, layers: Layers = None,
        positions: WhichTokens = None, strength: float = 1.0, keep_norm: bool = False,
    ) -> None:  # fmt: skip
        self.directions, self.factor = (
            PerLayer("direction", direction, (1,)).map(orthonormal_rows),
            as_number("factor", factor),
        )
        super().__init__(
            ("read", "write"), 1, site=site, layers=_layers_of(layers, self.directions), positions=positions,
            strength=strength, keep_norm=keep_norm,
        )  # fmt: skip

    def values(self, spot, width):
        unit = self.directions.at(spot)
        return {"read": unit, "write": (self.factor - 1) * unit}


class Rotate(Edit):
    """h' = h + z (Rot(angle) − I)ᵀ V, z = h Vᵀ: rotate h in a plane (angular steering).

    If plane and angle train, the plane's basis stays orthonormal (patching/orthonormal_basis.py).

    Args:
        plane: values (2, width). V is its Gram–Schmidt basis. The rotation goes from the first row toward the second.
        angle: radians.
    """

    options = ("angle",)
    allowed_names = (*TENSORS, "plane", "angle")

    def __init__(
        self, plane: Values, angle: float, *, trainable: bool = False, site: Site | None = None, layers: Layers = None,
        positions: WhichTokens = None, strength: float = 1.0, keep_norm: bool = False,
    ) -> None:  # fmt: skip
        planes = PerLayer("plane", plane, (2,))
        if any(len(p) != 2 for p in planes.all()):
            raise ValueError(f"plane has {len(planes.all()[0])} rows, expected the 2 directions that span it")
        self.planes, self.angle = planes.map(orthonormal_rows), as_number("angle", angle)
        if any(len(p) != 2 for p in self.planes.all()):
            raise ValueError("the plane's two directions are parallel: they span a line, not a plane")
        names = ("plane", "angle") if trainable else ("read", "write")
        super().__init__(
            names, 2, site=site, layers=_layers_of(layers, self.planes), positions=positions,
            strength=strength, keep_norm=keep_norm,
        )  # fmt: skip
        self.trainable = check_flag("trainable", trainable)

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
    """h' = h + (h @ readᵀ + offset) @ write, frozen: any low-rank edit, given by its factors.

    Args:
        read, write: values (rank, width), rank 1 to 64. offset: values (rank,), or None for 0.
    """

    def __init__(
        self, read: Values, offset: Values | None, write: Values, *, site: Site | None = None, layers: Layers = None,
        positions: WhichTokens = None, strength: float = 1.0, keep_norm: bool = False,
    ) -> None:  # fmt: skip
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
        super().__init__(
            self.given, ranks.pop(), site=site, layers=_layers_of(layers, *self.given.values()), positions=positions,
            strength=strength, keep_norm=keep_norm,
        )  # fmt: skip

    def values(self, spot, width):
        return {name: value.at(spot) for name, value in self.given.items()}


def _neutral(name, rank, width):
    if name == "scale":
        return torch.ones(width)
    return torch.zeros({"bias": (width,), "offset": (rank,)}.get(name, (rank, width)))


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
        raise ValueError("the directions are all zero: there is nothing to normalize")
    return torch.stack(basis).float()


def _layers_of(layers, *values):
    """layers=, or those that a mapping among the values names."""
    return next((v.layers for v in values if v is not None and v.layers is not None), None) if layers is None else layers
