"""Gates: when an edit acts, decided row by row from the hidden states.

    fastedit.Steer(directions).when(fastedit.Gate(condition, threshold=0.3, kind="cosine", decide="prompt"))

A gate is a coefficient g in [0, 1] per row: h' = h + c · g(h) · (…). Gates combine with & (g₁g₂), | (g₁ + g₂ − g₁g₂)
and ~ (1 − g). On hard gates these are and, or and not. Gates are frozen: nothing in them trains.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import torch

from ..arguments import as_number
from ..hints import Site, Values
from .per_layer import PerLayer
from .sites import check_site

KINDS = ("dot", "cosine", "cast")
DECIDE = ("token", "prompt", "prompt mean")


class Rule:
    """A gate, or a combination of several."""

    def __and__(self, other: Rule) -> Rule:
        return _Both("and", self, other)

    def __or__(self, other: Rule) -> Rule:
        return _Both("or", self, other)

    def __invert__(self) -> Rule:
        return _Not(self)


class Gate(Rule):
    """g = 1 where s > threshold, else 0. With a sharpness, g = sigmoid(sharpness · (s − threshold)). By `kind`, s is::

        "dot"      s = h · c
        "cosine"   s = h · c / (‖h‖ ‖c‖)
        "cast"     s = cos(h, tanh(ĉ (ĉ · h))), ĉ = c / ‖c‖: conditional activation steering (arXiv 2409.05907,
               Eq. 2 and the released code); the sign and the length of c do not matter

    Args:
        condition: c, values (width,): one tensor, one per layer, or a mapping from layer numbers (edits/kinds.py).
        threshold: one number, one per layer, or a mapping from layer numbers.
        kind: which s.
        decide: "token": each token by itself. "prompt": once per sequence, on its prompt's last token. The decision
            holds for all tokens of the sequence, in that forward and in those that follow on its cache. "prompt mean":
            the same, on the mean of the prompt's tokens without attention sinks (texts/sinks.py).
        sharpness: None for a hard gate, else a number above 0, in units of 1/s.
        layer: where h is measured. None: what the edit itself is given. Else a layer number or name, no later than the
            edit's: h is what arrives at that layer's site, before the edits there.
        site: with layer: the site there. By default the edit's own.

    Raises:
        TypeError, ValueError: an argument that is none of these.
    """

    def __init__(
        self, condition: Values | None, threshold: float | Iterable[float] | Mapping[int, float] = 0.0, *,
        kind: Literal["dot", "cosine", "cast"] = "dot", decide: Literal["token", "prompt", "prompt mean"] = "token",
        sharpness: float | None = None, layer: int | str | None = None, site: Site | None = None,
    ) -> None:  # fmt: skip
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}, expected one of {', '.join(map(repr, KINDS))}")
        if decide not in DECIDE:
            raise ValueError(f"decide is {decide!r}, expected one of {', '.join(map(repr, DECIDE))}")
        if sharpness is not None and not (_is_number(sharpness) and sharpness > 0):
            raise ValueError(f"sharpness is {sharpness!r}, expected None for a hard gate, or a number above 0")
        if isinstance(layer, bool) or not isinstance(layer, (int, str, type(None))):
            raise TypeError(f"layer is {layer!r}, expected None for the edit's own, a layer number or a layer name")
        if site is not None and layer is None:
            raise ValueError("site is given without layer: say at which layer's site the gate measures")
        self.kind, self.decide, self.layer = kind, decide, layer
        self.sharpness = None if sharpness is None else float(sharpness)
        self.site = None if site is None else check_site(site)
        self.condition = self.threshold = None
        if condition is not None:
            self.condition = PerLayer("condition", condition, (1,))
            if kind != "dot":
                self.condition = self.condition.map(_unit)
            self.threshold = PerLayer("threshold", _thresholds(threshold), (1,))

    def hold(self, conditions, thresholds):
        """Take {layer number: tensor} from a file as they are: nothing is normalized a second time."""
        self.condition = PerLayer("condition", conditions, (1,))
        self.threshold = PerLayer("threshold", thresholds, (1,))

    def values(self, spot, width):
        """{name: fp32 tensor on the CPU} of a layer. Zeros for a gate rebuilt from its config."""
        if self.condition is None:
            return {"condition": torch.zeros(width), "threshold": torch.zeros(1)}
        found = {"condition": self.condition.at(spot), "threshold": self.threshold.at(spot)}
        if found["condition"].shape[-1] != width:
            raise ValueError(
                f"the gate's condition has width {found['condition'].shape[-1]}, but what it measures at layer "
                f"{spot.name} is {width} wide"
            )
        return found

    def leaves(self):
        return [self]

    def combine(self, values):
        """The rule's coefficient, from an iterator over the coefficients of its leaves."""
        return next(values)

    def spec(self):
        """A JSON-able description, without the tensors."""
        described = {"kind": self.kind, "decide": self.decide}
        optional = {"sharpness": self.sharpness, "layer": self.layer, "site": self.site}
        return described | {name: value for name, value in optional.items() if value is not None}

    def __str__(self):
        where = "" if self.layer is None else f" at {self.layer}"
        return f"{self.kind}{where} by {self.decide}"


class _Both(Rule):
    def __init__(self, word, first, second):
        for rule in (first, second):
            check_rule(rule)
        self.word, self.first, self.second = word, first, second

    def leaves(self):
        return self.first.leaves() + self.second.leaves()

    def combine(self, values):
        first, second = self.first.combine(values), self.second.combine(values)
        return first * second if self.word == "and" else first + second - first * second

    def spec(self):
        return {self.word: [self.first.spec(), self.second.spec()]}

    def __str__(self):
        return f"({self.first} {self.word} {self.second})"


class _Not(Rule):
    def __init__(self, rule):
        self.rule = rule

    def leaves(self):
        return self.rule.leaves()

    def combine(self, values):
        return 1 - self.rule.combine(values)

    def spec(self):
        return {"not": self.rule.spec()}

    def __str__(self):
        return f"not {self.rule}"


def outside_kernels(rule):
    """Why an edit's kernel cannot decide this row by row as it edits, in words. None if it can."""
    if not isinstance(rule, Gate):
        return f"several gates are combined ({rule})"
    if rule.layer is not None:
        return f"its gate measures at layer {rule.layer}, not what the edit is given"
    if rule.decide != "token":
        return f"its gate is decided on the prompt (decide={rule.decide!r}), not for each token"
    if rule.kind not in ("dot", "cosine"):
        return f"its gate is of kind {rule.kind!r}"
    return None


def check_rule(rule):
    if not isinstance(rule, Rule):
        raise TypeError(f"expected a fastedit.Gate, or several combined by &, | and ~; found {type(rule).__name__}")
    return rule


def rule_of(spec):
    """The rule that `spec` describes. Its tensors are zeros until loaded.

    Raises:
        ValueError, TypeError: an unknown word or setting, by name.
    """
    if not isinstance(spec, Mapping):
        raise ValueError(f"a gate is described by {spec!r:.60}, expected an object")
    for word in ("and", "or"):
        if word in spec:
            rules = spec[word]
            if len(spec) != 1 or not isinstance(rules, list) or len(rules) != 2:
                raise ValueError(f"a gate is described by {spec!r:.60}, expected {word!r}: [two gates]")
            return _Both(word, rule_of(rules[0]), rule_of(rules[1]))
    if "not" in spec:
        if len(spec) != 1:
            raise ValueError(f"a gate is described by {spec!r:.60}, expected 'not': a gate")
        return _Not(rule_of(spec["not"]))
    unknown = set(spec) - {"kind", "decide", "sharpness", "layer", "site"}
    if unknown:
        raise ValueError(f"a gate's description has the unknown key {sorted(unknown)[0]!r}")
    return Gate(None, **spec)


def _unit(vector):
    length = vector.double().norm()
    if not length > 0:
        raise ValueError("the gate's condition is all zero: it has no direction to compare with")
    return (vector.double() / length).float()


def _thresholds(threshold):
    """What PerLayer takes: (1,), (layers, 1), or a mapping from layer numbers to (1,)."""
    if isinstance(threshold, Mapping):
        return {layer: _threshold(value) for layer, value in threshold.items()}
    one = isinstance(threshold, str) or getattr(threshold, "shape", None) == ()
    if isinstance(threshold, Iterable) and not one:
        found = [_threshold(value) for value in threshold]
        if not found:
            raise ValueError("threshold is empty, expected a number, one per layer, or a mapping from layer numbers")
        return torch.stack(found)
    return _threshold(threshold)


def _threshold(value):
    value = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_meta else value
    if not _is_number(value):
        raise ValueError(
            f"threshold is {value!r:.60}, expected a finite number, one per layer, or a mapping from layer numbers"
        )
    return torch.tensor([float(value)])


def _is_number(value):
    try:
        return math.isfinite(as_number("it", value))
    except ValueError:
        return False
