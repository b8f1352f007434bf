"""RoleRef: refusing what conflicts with a role (arXiv 2409.16913), by editing representations.

    vectors = roleref.vectors(model, tokenizer, answerable, conflicting)
    handle = fastedit.patch(model, roleref.edit(vectors))
    print(roleref.report(model, tokenizer, handle, conflicting, answerable, judge))

A pair k is a query that the role can answer and one that conflicts with what the role knows. With the last prompt
token's hidden states at layer l, d_k = h(answerable_k) − h(conflicting_k). μ and σ² are their mean and variance over
the pairs, per feature. The share `keep` of the features with the smallest variance carries the difference. The others
are zeroed:

    v_l = μ ⊙ mask,     h ← h + c v_l at every block's output, for all tokens;  c = −0.1 moves toward refusing.
"""

import tempfile
from dataclasses import dataclass
from itertools import pairwise

import torch

from ..capturing.capture import capture
from ..capturing.rows_on_disk import Rows
from ..directions.directions import Directions
from ..edits.kinds import Steer
from ..patching.handle import Handle
from .replies import plain, replies, wilson

STRENGTH = -0.1  # the paper's; it tries −0.3 … 0.3


def vectors(
    model, tokenizer, answerable, conflicting, *, keep=0.5, measured="output", batch_size=16, max_length=None, progress=None
):
    """The variance-masked vectors of pairs.

    Args:
        model, tokenizer, batch_size, max_length, progress: as in `fastedit.capture`.
        answerable, conflicting: prompts, strings or chat messages (`in_role` puts a role into the system turn),
            answerable[k] with conflicting[k].
        keep: the share of features kept (0.3 and 0.5 in the released code).
        measured: "output": of the block to which the vector is added. "input": of that block. The released code
            measures there, one block before it adds.

    Returns:
        Directions for every layer, with the statistics "kept" (features), "pairs", "norm" of μ, and "share", the part
        of ‖μ‖² that the mask leaves.

    Raises:
        TypeError, ValueError: sets that are not pairs or fewer than two, `keep` outside (0, 1], another `measured`, and
        what `capture` refuses.
    """
    sets = [list(answerable), list(conflicting)]
    if isinstance(answerable, str) or isinstance(conflicting, str):
        raise TypeError("answerable and conflicting are lists of prompts, found one text")
    if len(sets[0]) != len(sets[1]) or len(sets[0]) < 2:
        raise ValueError(
            f"expected two pairs or more, answerable[k] with conflicting[k]; found {len(sets[0])} answerable and "
            f"{len(sets[1])} conflicting prompts"
        )
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1:
        raise ValueError(f"keep is {keep!r}, expected a share of the features above 0 and at most 1")
    if measured not in ("output", "input"):
        raise ValueError(f"measured is {measured!r}, expected 'output' or 'input'")
    options = {"batch_size": batch_size, "max_length": max_length, "progress": progress}
    apart = _differences(model, tokenizer, sets, options, "block")
    if measured == "input":
        layers = sorted(apart)
        apart = {later: apart[earlier] for earlier, later in pairwise(layers)}
        apart |= {layers[0]: _differences(model, tokenizer, sets, options, "embed")[layers[0]]}
    found, statistics = {}, {}
    for layer in sorted(apart):
        found[layer], statistics[layer] = masked_mean(apart[layer], keep)
    about = {"method": "roleref", "site": "block", "at": "last token", "measured": measured, "keep": keep}
    return Directions(found, statistics, about)


def in_role(role, queries):
    """Chat messages: the role as the system turn, each query as the user's."""
    return [[{"role": "system", "content": role}, {"role": "user", "content": query}] for query in queries]


def _differences(model, tokenizer, sets, options, site):
    """{layer: answerable − conflicting (pairs, width), float64}"""
    pairs = len(sets[0])
    with tempfile.TemporaryDirectory(prefix="fastedit-rows-") as folder:
        capture(model, tokenizer, [*sets[0], *sets[1]], site=site, rows=folder, **options)
        rows = Rows(folder)
        hidden = {layer: rows.layer(layer)[0].double() for layer in rows.layers}
    return {layer: h[:pairs] - h[pairs:] for layer, h in hidden.items()}


def masked_mean(apart, keep):
    """(v (width,) fp32, statistics) of differences (pairs, width): their mean where the variance is among the
    smallest."""
    mean, variance = apart.mean(0), apart.var(0, correction=0)
    kept = max(1, round(keep * apart.shape[1]))
    mask = torch.zeros_like(mean)
    mask[variance.argsort(stable=True)[:kept]] = 1
    vector, norm = mean * mask, mean.norm()
    share = float((vector.norm() / norm).square()) if norm > 0 else 0.0
    return vector.float(), {"kept": kept, "pairs": len(apart), "norm": float(norm), "share": share}


def edit(vectors, strength=STRENGTH, *, layers=None):
    """h + c v at the output of every block (or of `layers`), all positions, in prefill and decode."""
    return Steer(vectors, site="block", layers=layers, strength=strength)


# --- what it does -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rate:
    """How often the judge saw a refusal: a share of `queries` with its 95 % interval (Wilson)."""

    refused: int
    queries: int

    @property
    def share(self):
        return self.refused / self.queries

    @property
    def interval(self):
        return wilson(self.refused, self.queries)

    def __str__(self):
        low, high = self.interval
        return f"{100 * self.share:5.1f} % ({100 * low:.0f}–{100 * high:.0f})"


class Report(dict):
    """{strength: {"conflicting": Rate, "answerable": Rate}}, strength 0 first. `str` is a table."""

    def __str__(self):
        lines = ["strength   refused, conflicting   over-refused, answerable"]
        for strength, rates in self.items():
            lines.append(f"{strength:8g}   {rates['conflicting']!s:>20}   {rates['answerable']!s:>24}")
        return "\n".join(lines)


def report(
    model, tokenizer, handle, conflicting, answerable, judge, *, strengths=(1.0,), max_new_tokens=64, batch_size=8
):
    """How often the model refuses what conflicts with its role, and what it could answer, with and without the edit.

    Args:
        handle: of the edit, on this model. It keeps its strength. strengths: for `handle.strength`, factors on the
            edit's own.
        conflicting, answerable: prompts that were not used for the vectors.
        judge: judge(prompt, reply) → whether the reply refuses: a classifier, a model, a rule of yours. Of messages it
            sees the last one's content.

    Returns:
        Report. Replies are greedy.

    Raises:
        TypeError, ValueError: no handle of this model, an empty set, a judge that does not return True or False.
    """
    if not isinstance(handle, Handle) or handle.model is not model:
        raise TypeError("handle is not a fastedit Handle on this model")
    sets = {"conflicting": list(conflicting), "answerable": list(answerable)}
    for name, prompts in sets.items():
        if not prompts:
            raise ValueError(f"{name} is empty: there is no rate to report")
    before, found = handle.strength, Report()
    try:
        for strength in dict.fromkeys([0.0, *strengths]):
            handle.strength = strength
            found[strength] = {
                name: _rate(model, tokenizer, prompts, judge, max_new_tokens, batch_size) for name, prompts in sets.items()
            }
    finally:
        handle.strength = before
    return found


def _rate(model, tokenizer, prompts, judge, max_new_tokens, batch_size):
    said = replies(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    verdicts = [judge(plain(prompt), reply) for prompt, reply in zip(prompts, said, strict=True)]
    for verdict in verdicts:
        if verdict not in (True, False):
            raise TypeError(f"judge returned {verdict!r}, expected True for a refusal or False")
    return Rate(sum(map(bool, verdicts)), len(verdicts))
