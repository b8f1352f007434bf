"""Which tokens of a text are measured, and the mean over them, without attention sinks (texts/sinks.py)."""

import re

import torch

from .sinks import above_median

FIXED = ("last token", "first token", "all tokens", "mean")
AT = (*FIXED, "last K", "response", "suffix", "span")


def check_at(at):
    """`at` as it is, or ValueError. "last 4" is the mean of a text's last four tokens."""
    if not isinstance(at, str) or (at not in AT[:4] and at not in AT[5:] and last_of(at) is None):
        raise ValueError(f"at is {at!r:.60}, expected one of {', '.join(map(repr, AT))} (K a number from 1 on)")
    return at


def last_of(at):
    """4 of "last 4". None of anything else."""
    found = re.fullmatch(r"last ([1-9][0-9]*)", at) if isinstance(at, str) else None
    return None if found is None else min(int(found[1]), 1 << 62)  # a tensor's numbers are compared with it


def has_span(at):
    """Whether a text's tokens are given one by one, as a span in the data."""
    return at in ("response", "suffix", "span")


class Pick:
    """The rows that are captured of a batch's hidden states (sequences, columns, width), for one stack and device.

    tokens (sequences, columns) bool: which are real. spans: (sequences, 2) numbers of real tokens, [start, stop), or
    None.
    """

    def __init__(self, tokens, spans, batch, at, sinks, device):
        self.at, self.sinks, self.index = at, sinks, batch.index
        self.tokens, self.group = tokens.to(device), batch.group.to(device)
        number = self.tokens.cumsum(1)  # from 1 on, padding apart
        last = number[:, -1:]
        if at == "first token":
            self.picked = self.tokens & (number == 1)
        elif at in ("all tokens", "mean"):
            self.picked = self.tokens
        elif has_span(at):
            start, stop = spans.to(device).T[:, :, None]
            self.picked = self.tokens & (number > start) & (number <= stop)
        else:
            self.picked = self.tokens & (number > last - (1 if at == "last token" else last_of(at)))
        self.column = self.picked.int().argmax(1) if at in ("last token", "first token") else None

    def rows(self, hidden):
        """(rows, group of each, tokens left out (): int64, of how many).

        rows: (sequences, width), or for "all tokens" those of hidden.
        """
        if self.column is not None:
            rows = hidden[torch.arange(len(hidden), device=hidden.device), self.column]
            return rows, self.group, None
        kept = self.picked
        if self.sinks is not None:
            kept = kept & ~above_median(hidden, self.tokens, self.sinks)
        left = torch.stack([(self.picked & ~kept).sum(), self.picked.sum()])
        if self.at == "all tokens":
            return hidden, torch.where(kept, self.group[:, None], -1).int(), left
        empty = (~kept.any(1)).nonzero().flatten().tolist()
        if empty:
            item, count = int(self.index[empty[0]]), int(self.picked[empty[0]].sum())
            why = f"all of them attention sinks (norm above {self.sinks} × the median of the text)" if count else "none"
            raise ValueError(
                f"item {item} has {count} tokens at {self.at!r}, {why}: there is no mean of them. Measure at other tokens"
                + (", or keep sinks with sinks=None" if count else "")
            )
        means = [h[real].mean(0, dtype=torch.float64) for h, real in zip(hidden, kept, strict=True)]
        rows = torch.stack(means)  # one sequence after another: no second copy of the batch
        return rows.to(torch.promote_types(hidden.dtype, torch.float32)), self.group, left
