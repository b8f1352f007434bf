"""Conditional activation steering, CAST (Lee et al. 2024, arXiv 2409.05907, section 3).

    h̄ = the mean (or the last token) of the prompt's hidden states at the condition layer
    s = cos(h̄, tanh((c cᵀ / cᵀc) h̄))
    h ← h + α v at the behavior layers, for all tokens of the sequence, if s and the threshold say so

`fit` finds a condition from two sets of prompts. It is a gate of kind "cast", decided on the prompt's forward and kept
for the generated tokens. Conditions combine with &, | and ~, and gate any edit, not only steering.
"""

import tempfile
from dataclasses import dataclass, field

import torch

from ..capturing.capture import capture
from ..capturing.rows_on_disk import Rows
from ..directions.contrast import _component, _split
from ..edits.gates import Gate
from ..edits.kinds import Steer

COMPARISONS = ("above", "below", "larger", "smaller")


def condition(vector, *, layer, threshold, when="above", over="mean", site="block"):
    """The gate of one condition.

    Args:
        vector: c (width,). Neither its length nor its sign matters.
        layer: where h̄ is measured: what arrives at that layer's site before the edits there. The released code
            measures the input of a layer: its layer n is layer n − 1's "block" here.
        threshold: a number in [−1, 1].
        when: "above": s > threshold opens the gate. "below": s ≤ threshold does. The released code's words are accepted
            too. Its "larger" means that the threshold is larger than s, which is "below". Its "smaller" is "above".
        over: "mean" of the prompt's tokens without padding and attention sinks (texts/sinks.py), or "last" token.

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
    """The edit: steer by `behaviour` at `layers` if `condition` says so.

    behaviour: values (width,), as fastedit.Steer takes them. condition: from `condition`, or any rule of gates.
    layers: no earlier than those at which the condition measures.
    """
    return Steer(behaviour, layers=layers, strength=strength, site=site).when(condition)


@dataclass(frozen=True)
class Condition:
    """What `fit` found. `gate()` makes it a condition.

    layer, threshold, when, over: as in `condition`. vector: c (width,).
    f1: on the held-out prompts. fitted_f1: on the others. held_out: how many. table: {layer: best fitted F1 there}.
    """

    vector: torch.Tensor = field(repr=False)
    layer: int
    threshold: float
    when: str
    over: str
    f1: float
    fitted_f1: float
    held_out: int
    table: dict

    def gate(self):
        return condition(self.vector, layer=self.layer, threshold=self.threshold, when=self.when, over=self.over)


def fit(
    model, tokenizer, positive, negative, *, layers=None, over="mean", vector="pca", held_out=0.25, seed=0, batch_size=16,
    max_length=None, progress=None,
):  # fmt: skip
    """The condition that opens on the positive prompts: the best of a grid over layer × threshold × side, by F1.

    Thresholds are half-way between the fitted prompts' similarities. Of conditions with equal F1, the one with the
    widest gap around its threshold is taken.

    Args:
        model, tokenizer, batch_size, max_length, progress: as in `fastedit.capture`.
        positive, negative: prompts, texts or chat messages, four or more of each; as many of both for vector="pca".
        layers: numbers to try. None for all. over: "mean" of the prompt's tokens or "last" token.
        vector: "pca": the first component of the pairs' differences, positive[k] with negative[k], as in the released
            code (which centers each pair, the same thing). "mean": the difference of means.
        held_out, seed: the share of the prompts on which the F1 is measured, and which ones.

    Raises:
        ValueError: another `over` or `vector`, too few prompts or no pairs, and what `capture` refuses.
    """
    positive, negative = list(positive), list(negative)
    _check_fit(positive, negative, over, vector, held_out)
    at = "mean" if over == "mean" else "last token"
    with tempfile.TemporaryDirectory(prefix="fastedit-rows-") as folder:
        capture(
            model, tokenizer, [*positive, *negative], layers=layers, at=at, rows=folder, batch_size=batch_size,
            max_length=max_length, progress=progress,
        )  # fmt: skip
        rows = Rows(folder)
        hidden = {layer: rows.layer(layer)[0].double() for layer in rows.layers}
    fitted, judged = zip(*_split(len(positive), len(negative), held_out, seed), strict=True)
    best, table = None, {}
    for layer, states in hidden.items():
        sets = states[: len(positive)], states[len(positive) :]
        train, test = ([sets[0][part[0]], sets[1][part[1]]] for part in (fitted, judged))
        difference = train[0].mean(0) - train[1].mean(0)
        c = difference if vector == "mean" else _component(*train, difference, False)[0]
        c = (c / c.norm()).float()
        said = [similarity(rows, c) for rows in train]
        f1, gap, threshold, when = _threshold(*said)
        table[layer] = f1
        if best is None or (f1, gap) > best[0]:
            held = _f1(*(_opens(similarity(rows, c), threshold, when) for rows in test))
            best = (f1, gap), Condition(c, layer, threshold, when, over, held, f1, sum(map(len, test)), table)
    return best[1]


def similarity(rows, c):
    """s of rows (n, width), (n,) float64; c (width,) of length 1."""
    rows, c = rows.double(), c.double()
    return torch.cosine_similarity(rows, torch.tanh((rows @ c)[:, None] * c), dim=-1)


def _opens(said, threshold, when):
    return said > threshold if when == "above" else said <= threshold


def _f1(positive, negative):
    """F1 of a gate that opens on these positive and negative prompts (n,) bool."""
    hits, wrong, missed = int(positive.sum()), int(negative.sum()), int((~positive).sum())
    return 2 * hits / (2 * hits + wrong + missed) if hits else 0.0


def _threshold(positive, negative):
    """(F1, gap, threshold, when) of the best one. gap: from the threshold to the next similarity."""
    found = torch.cat([positive, negative]).unique()
    halves = (found[1:] + found[:-1]) / 2 if len(found) > 1 else found
    gaps = (found[1:] - found[:-1]) / 2 if len(found) > 1 else torch.zeros_like(found)
    tried = [
        (_f1(*(_opens(said, t, when) for said in (positive, negative))), gap.item(), t.item(), when)
        for t, gap in zip(halves, gaps, strict=True)
        for when in ("above", "below")
    ]
    return max(tried, key=lambda one: one[:2])


def _check_fit(positive, negative, over, vector, held_out):
    if over not in ("mean", "last"):
        raise ValueError(f"over is {over!r}, expected 'mean' or 'last'")
    if vector not in ("pca", "mean"):
        raise ValueError(f"vector is {vector!r}, expected 'pca' or 'mean'")
    if isinstance(held_out, bool) or not isinstance(held_out, (int, float)) or not 0 < held_out < 1:
        raise ValueError(f"held_out is {held_out!r}, expected a share between 0 and 1")
    if min(len(positive), len(negative)) < 4 or (vector == "pca" and len(positive) != len(negative)):
        need = "four or more of each" + (", as many of both (vector='mean' takes others)" if vector == "pca" else "")
        raise ValueError(f"found {len(positive)} positive and {len(negative)} negative prompts, expected {need}")
