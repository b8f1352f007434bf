"""Recipes for layers that are a chain of branches, each added to the residual stream. Most families fit one."""

from dataclasses import dataclass

import torch

from .family import AddOf


@dataclass(frozen=True)
class Step:
    """hidden ← after(hidden + multiplier · dropout(behind(inner(before(hidden))))), each part only if named.

    inner: a submodule's name, or the names of a chain called one after another. Dropout probabilities may be among
        them.
    site: of the inner's output. None for a cross-attention, which has none.
    before, behind, after: names of norms.
    dropout: a submodule's name, the name of a probability, or the path of a dropout inside the inner.
    multiplier: an attribute of the layer.
    attention: whether the inner gets the layer's arguments and returns a tuple. keyword: whether the hidden states are
        passed as hidden_states=. drops: arguments that it does not get. only: names of all that it gets. renamed:
        (argument, the inner's name for it). positional: the argument that it gets by position after the hidden states.
    only_with: the step is left out where this argument is None.
    """

    inner: str | tuple
    site: str | None = None
    before: str | None = None
    behind: str | None = None
    after: str | None = None
    dropout: str | None = None
    multiplier: str | None = None
    attention: bool = False
    keyword: bool = False
    drops: tuple = ()
    only: tuple = ()
    renamed: tuple = ()
    positional: str | None = None
    only_with: str | None = None

    @property
    def chain(self):
        return (self.inner,) if isinstance(self.inner, str) else self.inner

    def why_plain(self):
        """Why an edit at the step's site cannot ride on its add, or None."""
        if self.behind is not None:
            return "a norm stands between it and the add"
        return None if self.multiplier is None else "the layer scales it before the add, and rounds in between"


@dataclass(frozen=True)
class ResidualLayer:
    """Steps one after another, in the layer's own forward.

    flat: whether the last step works on (rows, width). more: whether the first attention's other outputs are returned
    after the sum. apart: a dtype in which the layer treats the sum further; its own forward then serves.
    """

    steps: tuple
    flat: bool = False
    more: bool = False
    apart: torch.dtype | None = None
    owner = ""

    @property
    def sites(self):
        carried = [step.site for step in self.steps if step.site and step.why_plain() is None]
        return (*carried, "block") if self.steps[-1].after is None else tuple(carried)

    @property
    def norms(self):
        names = [name for step in self.steps for name in (step.before, step.behind, step.after)]
        return tuple(name for name in names if name is not None)

    @property
    def entry(self):
        return self.steps[0].before

    @property
    def optional(self):
        return tuple(step.only_with for step in self.steps if step.only_with is not None)

    def adds(self):
        return tuple(
            AddOf(
                step.chain[-1], step.site if step.why_plain() is None else None,
                step is self.steps[-1] and step.after is None, step.dropout, 2 if step.attention else 1,
            )
            for step in self.steps
        )  # fmt: skip

    def why_plain(self, site):
        if site == "block":
            return "the layer ends in a norm: there is no add for the edit to ride on"
        return next((step.why_plain() for step in self.steps if step.site == site), None)


@dataclass(frozen=True)
class ParallelLayer:
    """hidden ← hidden + dropout(mlp(…) + attention(…)). Both read what enters the layer.

    norms: (attention's, FFN's), or one that both read. inners: (attention, FFN). dropouts: of each, by name.
    sum_dropout: of their sum. only, more: as in Step and ResidualLayer.
    """

    norms: tuple
    inners: tuple
    dropouts: tuple = (None, None)
    sum_dropout: str | None = None
    only: tuple = ()
    more: bool = False
    owner = ""
    sites = ("attn", "mlp", "block")

    @property
    def entry(self):
        return self.norms[0]

    def adds(self):
        return tuple(
            AddOf(inner, site, False, dropout, outputs)
            for inner, site, dropout, outputs in zip(
                self.inners, ("attn", "mlp"), self.dropouts, (2, 1), strict=True
            )
        )

    def why_plain(self, site):
        return "it is added to the FFN's output, and that add carries the edit of 'mlp'"
