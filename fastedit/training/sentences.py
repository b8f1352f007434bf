"""Sentences, pairs of sentences and numbers for them: an edit under a head on an encoder.

    model, handle = training.classify(encoder, tokenizer, rows, fastedit.RED())       # rows: [(text, label number)]
    model, handle = training.pairs(encoder, tokenizer, rows, fastedit.RED())          # [((text, other), label number)]
    model, handle = training.regress(encoder, tokenizer, rows, fastedit.RED())        # [(text or pair, number)]
    handle.save("my-edit")

`GLUE` holds the settings of the RED paper (arXiv 2402.15179) for RoBERTa-base, for **GLUE["sst2"] and the like.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from ..edits.kinds import Edit
from ..patching.handle import Handle, patch
from .recipes import SentenceClassifier, fit

_PUBLISHED = {"sst2": 1e-3, "mrpc": 5e-3, "cola": 5e-3, "rte": 8e-3}
GLUE: dict[str, dict[str, Any]] = {task: {"head": "token", "lr": lr, "epochs": 40} for task, lr in _PUBLISHED.items()}
HEADS = ("mean", "token")
Text: TypeAlias = str | tuple[str, str]


class TokenHead(SentenceClassifier):
    """The RED paper's head on GLUE: token 0, Dropout .5, Linear (d, d), tanh, Dropout .5, Linear (d, labels).

    Called and trained as SentenceClassifier is.

    Args:
        encoder, labels: as of SentenceClassifier. dropout: the share.
    """

    def __init__(self, encoder: nn.Module, labels: int, dropout: float = 0.5) -> None:
        super().__init__(encoder, labels)
        width = encoder.config.hidden_size
        self.classifier = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(width, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, labels)
        )

    def pooled(self, states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Token 0 of states (batch, tokens, width). attention_mask does not matter."""
        return states[:, 0]


def with_head(encoder, outputs, head="mean"):
    """The encoder under a new head."""
    if head not in HEADS:
        raise ValueError(f"head is {head!r}, expected one of {', '.join(HEADS)}")
    kind = TokenHead if head == "token" else SentenceClassifier
    made = kind(encoder, outputs)
    made.classifier.to(next(encoder.parameters()).device)
    return made


def classify(
    encoder: nn.Module, tokenizer: Any, rows: Sequence[tuple[Text, int]], edits: Edit | Sequence[Edit], *,
    labels: int | None = None, head: Literal["mean", "token"] = "mean", lr: float = 2e-2, epochs: float = 2,
    batch_size: int = 32, seed: int = 0, **options: Any,
) -> tuple[SentenceClassifier, Handle]:  # fmt: skip
    """Fit edits and a new head to (text, label number) rows. Returns (model, handle).

    Args:
        encoder: a model with `last_hidden_state`, such as AutoModel gives. It is patched in place.
        rows: (text, label number from 0 on).
        labels: how many. By default the largest label + 1. head: "mean" or "token", the RED paper's.
        tokenizer: of the encoder. edits: as for `fastedit.patch`.
        lr: of AdamW. epochs, batch_size: of the training. seed: of the head's start, the order of rows and dropout.
        options: further TrainingArguments, and callbacks.

    Returns:
        (model, handle): the encoder under its head, and the handle on it.

    Raises:
        ValueError: no rows, or a label that is not a number from 0 on. Nothing has been patched.
    """
    _check(rows)
    for number, (_, label) in enumerate(rows, 1):
        if isinstance(label, bool) or not isinstance(label, int) or label < 0:
            raise ValueError(f"row {number}: the label is {label!r}, expected a whole number from 0 on")
    count = max(label for _, label in rows) + 1
    if labels is not None and count > labels:
        raise ValueError(f"a row has label {count - 1}, and labels={labels}")
    return _fit(encoder, tokenizer, rows, edits, labels or max(2, count), head, lr, epochs, batch_size, seed, options)


def pairs(
    encoder: nn.Module, tokenizer: Any, rows: Sequence[tuple[tuple[str, str], int]], edits: Edit | Sequence[Edit],
    **options: Any,
) -> tuple[SentenceClassifier, Handle]:  # fmt: skip
    """Fit edits and a new head to ((text, other text), label number) rows. Returns (model, handle).

    Args:
        encoder, tokenizer, edits, options: as of `classify`, its keyword arguments among the options.
        rows: ((text, other text), label number from 0 on).

    Raises:
        ValueError: a row without two texts, and what `classify` refuses. Nothing has been patched.
    """
    for number, row in enumerate(rows, 1):
        text = row[0]
        if isinstance(text, str) or len(text) != 2 or not all(isinstance(t, str) for t in text):
            raise ValueError(f"row {number}: found {text!r:.60}, expected a pair of texts")
    return classify(encoder, tokenizer, rows, edits, **options)


def regress(
    encoder: nn.Module, tokenizer: Any, rows: Sequence[tuple[Text, float]], edits: Edit | Sequence[Edit], *,
    head: Literal["mean", "token"] = "mean", lr: float = 2e-2, epochs: float = 2, batch_size: int = 32,
    seed: int = 0, **options: Any,
) -> tuple[SentenceClassifier, Handle]:  # fmt: skip
    """Fit edits and a head of one output to (text or pair, number) rows by mean squared error.

    Args:
        encoder: a model with `last_hidden_state`, such as AutoModel gives. It is patched in place.
        rows: (text, number), or ((text, other text), number). head: "mean" or "token", the RED paper's.
        tokenizer: of the encoder. edits: as for `fastedit.patch`.
        lr: of AdamW. epochs, batch_size: of the training. seed: of the head's start, the order of rows and dropout.
        options: further TrainingArguments, and callbacks.

    Returns:
        (model, handle): the encoder under its head, and the handle on it.

    Raises:
        ValueError: no rows, or a value that is no number. Nothing has been patched.
    """
    _check(rows)
    try:
        rows = [(text, float(value)) for text, value in rows]
    except (TypeError, ValueError):
        bad = next(n for n, (_, value) in enumerate(rows, 1) if not _is_number(value))
        raise ValueError(f"row {bad}: {rows[bad - 1][1]!r} is no number") from None
    return _fit(encoder, tokenizer, rows, edits, 1, head, lr, epochs, batch_size, seed, options)


def _fit(encoder, tokenizer, rows, edits, outputs, head, lr, epochs, batch_size, seed, options):
    torch.manual_seed(seed)
    model = with_head(encoder, outputs, head)
    handle = patch(model, edits, freeze=True)
    fit(model, handle, rows, tokenizer, lr=lr, epochs=epochs, batch_size=batch_size, seed=seed, **options)
    return model, handle


def _check(rows):
    if not rows:
        raise ValueError("there are no rows to train on")


def _is_number(value):
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def correlations(found, expected):
    """{"pearson", "spearman"} of two lists of numbers. NaN if one of them is constant."""
    a, b = (torch.as_tensor(v, dtype=torch.float64).flatten() for v in (found, expected))
    return {"pearson": _pearson(a, b), "spearman": _pearson(_ranks(a), _ranks(b))}


def _pearson(a, b):
    a, b = a - a.mean(), b - b.mean()
    return float((a @ b) / (a.norm() * b.norm()))


def _ranks(values):
    """Ranks from 0. Ties get the average of their ranks."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    return (last.double() - (counts + 1) / 2)[inverse]
