"""What a handle's edits did to a batch: which tokens of which rows, by which edit, how strongly, behind which gate.

The forward runs on the plain path, where every edit sees the hidden states that it is given. The fused path edits the
same rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .eval_mode import check_data
from .report import _ranges
from .rows.row_plan import NOWHERE
from .site import Stage

_HEAD = ("edit", "site", "layers", "row", "tokens", "strength", "gate")


@dataclass
class Told:
    """One edit at one layer: the factor on it at each token (batch, tokens), 0 where nothing was edited.

    number: of the edit in its handle. strength: the part that all its tokens share. gated: the gate's part (batch,
    tokens), or None without a gate. gate: the gate in words, or None.
    """

    number: int
    edit: str
    site: str
    layer: str
    strength: float
    placed: torch.Tensor
    gated: torch.Tensor | None
    gate: str | None

    @property
    def factor(self):
        factor = self.placed * self.strength
        return factor if self.gated is None else factor * self.gated


@dataclass
class Explanation:
    """`told`: one Told per edit and layer. Printed: one line per row of the batch; layers that are alike share a
    line."""

    told: list
    input_ids: torch.Tensor | None = None
    names: tuple = field(default=_HEAD, repr=False)

    def lines(self):
        """[(edit, site, layers, row, tokens, strength, gate)]. A row that no edit touches has "none"."""
        groups = {}
        for one in self.told:
            for row, factor in enumerate(one.factor):
                here = [number for number, value in enumerate(factor.tolist()) if value]
                tokens = _ranges(here) if here else "none"
                said = sorted({round(value, 4) for value in factor[here].tolist()}) if here else [0.0]
                strength = f"{said[0]:g}" if len(said) == 1 else f"{said[0]:g} to {said[-1]:g}"
                gate = "" if one.gate is None else f"{one.gate}: {_open(one.gated[row], one.placed[row])}"
                stack, _, layer = one.layer.rpartition(".")
                key = (one.number, one.edit, one.site, stack, row, tokens, strength, gate)
                groups.setdefault(key, []).append(int(layer))
        for (number, edit, site, stack, row, *rest), layers in groups.items():
            yield (f"{number} {edit}", site, f"{stack}.{_ranges(layers)}", str(row), *rest)

    def __str__(self):
        lines = [self.names, *self.lines()]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.names))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)

    __repr__ = __str__

    def __rich__(self):
        from rich.table import Table

        table = Table(*self.names)
        for line in self.lines():
            table.add_row(*line)
        return table

    def plot(self, tokenizer=None, axes=None):
        """A picture: one line per edit and row of the batch, one column per token. Color is the mean factor over the
        layers.

        Args:
            tokenizer: writes the tokens of the first row below the columns. axes: matplotlib's, or None for new ones.
        """
        from ..plots.explained import draw

        return draw(self, tokenizer, axes)


def _open(gated, placed):
    where = placed != 0
    share = float(gated[where].float().mean()) if bool(where.any()) else 0.0
    return f"{100 * share:.0f} % open"


WORKERS = 300  # seconds that another thread's forward waits for this one, which may be waiting for it


def explain(handle, inputs):
    """Run a forward of a handle's model on `inputs` and say what its edits did."""
    with handle._root.turn:
        return _explain(handle, inputs)


def _explain(handle, inputs):
    if handle.removed or handle.merged:
        state = "removed from its model" if handle.removed else "merged into the weights, which act on every token"
        raise RuntimeError(f"there is nothing to explain: this handle is {state}")
    given = dict(inputs) if isinstance(inputs, Mapping) else {"input_ids": inputs}
    ids = given.get("input_ids", given.get("inputs_embeds"))
    if not isinstance(ids, torch.Tensor) or ids.dim() < 2:
        raise TypeError(f"inputs is {inputs!r:.60}, expected input_ids (batch, tokens), or a mapping with what the model takes")
    root, model = handle._root, handle.model
    check_data(model, "to explain a forward")
    root.look()
    stacks = {(site.layer, site.site): site.masters for site in root.sites.values()}
    fused = [(m, m.fused) for masters in stacks.values() for m in masters]
    told = []
    with root.changing(model, "explain"):
        try:
            for m, _ in fused:
                m.fused = False
            root.change(model, stacks)
            _listen(handle, told)
            root.watch.limit = WORKERS
            with torch.no_grad():
                model(**given)
        finally:
            for m, before in fused:
                m.fused = before
            root.change(model, stacks)  # new stages, which nobody listens to
    told.sort(key=lambda one: one.number)
    return Explanation(told, ids if ids.dim() == 2 else None)


def _listen(handle, told):
    """Make the stages of a handle's edits report what they are about to do."""
    own = {}
    for number, (edit, members) in enumerate(zip(handle.edits, handle._members, strict=True)):
        own |= {id(masters): (number, edit, layer) for layer, masters in members}
    for site in handle._root.sites.values():
        for stage in site.stages:
            mine = [(m, *own[id(m)]) for m in stage.masters if id(m) in own]
            if mine and isinstance(stage, Stage):
                stage.apply = _telling(stage, mine, told)


def _telling(stage, mine, told):
    def apply(hidden):
        lead = hidden.shape[:-1]
        placed = torch.ones(lead, device=hidden.device)
        if stage.positions is not None:
            here = stage.stack.coefficient(stage.positions, hidden.shape, hidden.device)
            placed = placed * (1.0 if here is None else 0.0 if here is NOWHERE else here.view(lead))
        gated = None
        if stage.looks is not None:
            gated = stage.looks.say(hidden)
        elif stage.gating is not None:
            gated = stage.gating.coefficient(hidden, stage.stack)
        if stage.masters[0].tenancy is not None:
            placed = placed * (stage.masters[0].tenancy.slot(hidden) >= 0)
        for m, number, edit, layer in mine:
            told.append(Told(
                number, type(edit).__name__, edit.site, layer.name, m.strength, placed.cpu(),
                None if gated is None else gated.expand(lead).cpu(), None if edit.gate is None else str(edit.gate),
            ))  # fmt: skip
        return type(stage).apply(stage, hidden)

    return apply
