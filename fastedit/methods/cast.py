"""Conditional activation steering, CAST (Lee et al. 2024, arXiv 2409.05907, section 3).

    h̄ = the mean (or the last token) of the prompt's hidden states at the condition layer
    s = cos(h̄, tanh((c cᵀ / cᵀc) h̄))
    h ← h + α v at the behaviour layers, for all tokens of the sequence, where s and the threshold say so

A condition is a gate of kind "cast". Decided on the prompt's forward and kept for what is generated. Conditions combine
with &, | and ~, and gate any edit, not steering alone.
"""

from ..edits import Steer
from ..gates import Gate

COMPARISONS = ("above", "below", "larger", "smaller")


def condition(vector, *, layer, threshold, when="above", over="mean", site="block"):
    """The gate of one condition.

    Args:
        vector: c (width,); neither its length nor its sign matters.
        layer: where h̄ is measured, what arrives at that layer's site before the edits there. The released code
            measures what enters a layer: its layer n is layer n − 1's "block" here.
        threshold: a number in [−1, 1].
        when: "above": s > threshold opens the gate. "below": s ≤ threshold does. The released code's words are taken,
            too: its "larger" means that the threshold is larger than s, which is "below"; its "smaller" is "above".
        over: "mean" of the prompt's tokens, padding and attention sinks (sinks.py) left out, or "last" token.

    Raises:
        ValueError: another `when` or `over`, or what fastedit.Gate refuses.
    """
    if when not in COMPARISONS:
        raise ValueError(f"when is {when!r}, expected one of {', '.join(map(repr, COMPARISONS))}")
    if over not in ("mean", "last"):
        raise ValueError(f"over is {over!r}, expected 'mean' or 'last'")
    decide = "prompt mean" if over == "mean" else "prompt"
    gate = Gate(vector, threshold, kind="cast", decide=decide, layer=layer, site=site)
    return gate if when in ("above", "smaller") else ~gate


def cast(behaviour, condition, *, layers=None, strength=1.0, site="block"):
    """The edit: steer by `behaviour` at `layers` where `condition` says so.

    behaviour: values (width,), as fastedit.Steer takes them. condition: of `condition`, or any rule of gates.
    layers: no earlier than those the condition measures at.
    """
    return Steer(behaviour, layers=layers, strength=strength, site=site).when(condition)
