"""Directions from two sets of texts: contrast of means, PCA of paired differences, linear probes."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..arguments import as_list, check_flag
from ..capturing.capture import capture
from ..capturing.rows_on_disk import Rows
from ..hints import Folder, Layers, Site, Texts
from ..texts.picking import check_at
from ..texts.sinks import SINKS
from .directions import Directions

METHODS = ("mean", "pca", "probe")
POSITIVE, NEGATIVE = "positive", "negative"


def contrast(
    model: nn.Module, tokenizer: Any, positive: Texts, negative: Texts, *,
    method: Literal["mean", "pca", "probe"] = "mean", layers: Layers = None, site: Site = "block", at: str = "last token",
    probe: Literal["logistic", "mass-mean"] = "logistic", centre: bool = False, held_out: float = 0.25, seed: int = 0,
    batch_size: int = 16, max_length: int | None = None, resume: Folder | None = None, progress: bool | None = None,
    suffix: str | None = None, spans: Sequence[tuple[int, int]] | None = None, sinks: float | None = SINKS,
) -> Directions:  # fmt: skip
    """Directions that lead from the negative texts to the positive ones, one per layer.

    method "mean": v = mean(h | positive) − mean(h | negative) (CAA, arXiv 2312.06681; ActAdd, arXiv 2308.10248), in one
    pass that stores nothing.

    method "pca": the first principal component, at length 1, of the differences of pairs (RepE, arXiv 2310.01405),
    positive[k] with negative[k]. Its sign is that of the contrast of means. centre=False takes the component about
    zero, which is that of differences with random signs, as in the paper. centre=True first subtracts the mean
    difference, as repeng's code does, and finds what varies beside it.

    method "probe": a linear probe, h·v + offset > 0 for positive, fitted to all texts except a held-out share. probe
    "logistic": logistic regression on standardized features, v at length 1. probe "mass-mean": v = the difference of
    means, and the offset half-way between (arXiv 2310.06824).

    Args:
        model, tokenizer, layers, site, at, batch_size, max_length, resume, progress, suffix, sinks: as in
            `fastedit.capture`. `at` is one row per text, so not "all tokens". The folder `resume` also keeps the rows
            that PCA and probes need. Otherwise they are in a temporary folder.
        positive, negative: lists of texts (or of lists of token ids).
        spans: with at="span", (start, stop) for each text, the positive ones first.
        held_out: the share of texts (of pairs, if there are as many of both) on which a probe is judged. seed: which
            ones.

    Returns:
        Directions with statistics for each layer: "positive", "negative" (how many texts); "norm" of the difference of
        means; "residual", the root mean square of the measured rows' norms; "separation", the difference's norm over
        the root of the mean within-class variance summed over features; if `at` is a mean, "sinks", how many tokens
        were left out of it, and "tokens", of how many; for "pca" "explained", the component's share of the sum of
        squares; for "probe" "accuracy" on the held-out texts, "fitted_accuracy" on the others, "held_out" (how many),
        "offset".

    Raises:
        TypeError, ValueError: a method, probe or share that does not exist, sets that are empty or not paired, and
        everything that `capture` refuses. ImportError: "logistic" without scikit-learn.
    """
    check_flag("centre", centre)
    positive, negative = _checked(positive, negative, method, at, probe, held_out)
    data = [*positive, *negative]
    groups = [POSITIVE] * len(positive) + [NEGATIVE] * len(negative)
    with tempfile.TemporaryDirectory(prefix="fastedit-rows-") as folder:
        folder = folder if resume is None else Path(resume) / "rows"
        captured = capture(
            model, tokenizer, data, layers=layers, site=site, at=at, groups=groups, group_names=[POSITIVE, NEGATIVE],
            batch_size=batch_size, max_length=max_length, progress=progress, resume=resume,
            rows=None if method == "mean" else folder, suffix=suffix, spans=spans, sinks=sinks,
        )  # fmt: skip
        vectors, statistics = {}, {}
        rows = None if method == "mean" else Rows(folder)
        for layer, moments in captured.items():
            mean = moments.mean()
            difference = (mean[0] - mean[1]).cpu()
            statistics[layer] = _of_moments(moments, difference)
            if captured.left_out[layer][1]:
                statistics[layer]["sinks"], statistics[layer]["tokens"] = captured.left_out[layer]
            if method == "mean":
                vectors[layer] = difference
            else:
                hidden = rows.layer(layer)[0].double()
                sets = hidden[: len(positive)], hidden[len(positive) :]
                fit = _component if method == "pca" else _probe
                options = (centre,) if method == "pca" else (probe, held_out, seed)
                vectors[layer], more = fit(*sets, difference, *options)
                statistics[layer] |= more
    if all(found["norm"] == 0 for found in statistics.values()):
        raise ValueError(
            f"at the {at} the two sets have the same hidden states in every layer, so there is no direction (a first token "
            "that begins every text says nothing of it); use another `at`"
        )
    about = {"method": f"{probe} probe" if method == "probe" else method, "site": site, "at": at} | _of_model(model)
    return Directions({layer: vector.float() for layer, vector in vectors.items()}, statistics, about)


def _checked(positive, negative, method, at, probe, held_out):
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(map(repr, METHODS))}")
    if probe not in ("logistic", "mass-mean"):
        raise ValueError(f"probe is {probe!r}, expected 'logistic' or 'mass-mean'")
    if check_at(at) == "all tokens":
        raise ValueError("at is 'all tokens', expected one row per text: 'last token', 'mean', 'last 4', 'response', …")
    sets = []
    for name, texts in ((POSITIVE, positive), (NEGATIVE, negative)):
        sets.append(as_list(name, texts, "a list of texts"))
        if not sets[-1]:
            raise ValueError(f"{name} is empty: a contrast needs texts on both sides")
    if method == "pca" and (len(sets[0]) != len(sets[1]) or len(sets[0]) < 2):
        raise ValueError(
            f"method 'pca' takes the differences of two pairs or more, positive[k] with negative[k]; found "
            f"{len(sets[0])} positive and {len(sets[1])} negative texts"
        )
    if method == "probe":
        if not isinstance(held_out, (int, float)) or not 0 < held_out < 1:
            raise ValueError(f"held_out is {held_out!r}, expected a share between 0 and 1")
        if min(map(len, sets)) < 4:
            raise ValueError(f"a probe needs 4 texts on each side, found {len(sets[0])} and {len(sets[1])}")
        if probe == "logistic":
            _logistic_regression()
    return sets


def _of_moments(moments, difference):
    count = moments.count
    within = torch.nan_to_num(moments.variance()).sum(1).mean().sqrt().item()
    norm = difference.norm().item()
    separation = norm / within if within > 0 else None
    square = moments.mean().square().sum(1) + moments.variance(correction=0).sum(1)
    residual = ((square * count).sum() / count.sum()).sqrt().item()
    return {POSITIVE: int(count[0]), NEGATIVE: int(count[1]), "norm": norm, "separation": separation, "residual": residual}


def _component(positive, negative, difference, centre):
    pairs = positive - negative
    pairs = pairs - pairs.mean(0) if centre else pairs
    total = pairs.square().sum()
    if not total > 0:
        raise ValueError("the pairs do not differ: there is no component; use other texts, or centre=False")
    _, singular, components = torch.linalg.svd(pairs, full_matrices=False)
    vector = components[0]
    if vector @ difference < 0:
        vector = -vector
    return vector, {"explained": (singular[0].square() / total).item()}


def _probe(positive, negative, difference, probe, held_out, seed):
    fitted, judged = zip(*_split(len(positive), len(negative), held_out, seed), strict=True)
    train, test = ([positive[part[0]], negative[part[1]]] for part in (fitted, judged))
    vector, offset = _mass_mean(*train) if probe == "mass-mean" else _logistic(*train, seed)
    return vector, {
        "accuracy": _accuracy(*test, vector, offset), "fitted_accuracy": _accuracy(*train, vector, offset),
        "held_out": len(test[0]) + len(test[1]), "offset": offset,
    }  # fmt: skip


def _split(positive, negative, held_out, seed):
    """((fitted, held out) of the positive texts, the same of the negative ones). Pairs stay together."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(positive, generator=generator)]
    orders.append(orders[0] if negative == positive else torch.randperm(negative, generator=generator))
    for order in orders:
        cut = min(max(1, round(held_out * len(order))), len(order) - 2)
        yield order[cut:], order[:cut]


def _mass_mean(positive, negative):
    vector = positive.mean(0) - negative.mean(0)
    return vector, -(vector @ (positive.mean(0) + negative.mean(0)) / 2).item()


def _logistic(positive, negative, seed):
    hidden = torch.cat([positive, negative])
    mean, scale = hidden.mean(0), hidden.std(0)
    scale = torch.where(scale > 0, scale, 1.0)
    labels = [1] * len(positive) + [0] * len(negative)
    model = _logistic_regression()(max_iter=1000, random_state=seed)
    model.fit(((hidden - mean) / scale).numpy(), labels)
    weight = torch.from_numpy(model.coef_[0]).double() / scale
    offset = float(model.intercept_[0]) - (weight @ mean).item()
    norm = weight.norm()
    if not norm > 0:
        raise ValueError("the probe found nothing: the sets have the same hidden states")
    return weight / norm, offset / norm.item()


def _logistic_regression():
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise ImportError("probe='logistic' needs scikit-learn: pip install scikit-learn") from None
    return LogisticRegression


def _accuracy(positive, negative, vector, offset):
    right = int((positive @ vector + offset > 0).sum()) + int((negative @ vector + offset <= 0).sum())
    return right / (len(positive) + len(negative))


def _of_model(model):
    config = getattr(model, "config", None)
    return {
        "model": getattr(config, "_name_or_path", None) or None,
        "type": getattr(config, "model_type", type(model).__name__),
    }
