"""What `verify` found: one row per mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

_COLORS = {"right": "green", "wrong": "red", "refused": "yellow", "left out": "dim"}


@dataclass
class Row:
    """verdict: "right"; "wrong"; "refused", by an error that says why; "left out", because the model itself differs or
    cannot.

    The largest in the logits (or gradients): difference, from the reference; allowed, still right; effect, of the
    edits.
    """

    mode: str
    verdict: str
    difference: float | None = None
    allowed: float | None = None
    effect: float = 0.0
    note: str = ""


class Outcome:
    """rows: one Row per mode. ok: nothing is wrong. Printed as a table."""

    def __init__(self, model: object, rows: Sequence[Row]) -> None:
        self.name, self.rows = type(model).__name__, rows

    @property
    def ok(self) -> bool:
        return not any(row.verdict == "wrong" for row in self.rows)

    def json(self) -> dict[str, Any]:
        """A JSON-able description."""
        return {"model": self.name, "ok": self.ok, "rows": [asdict(row) for row in self.rows]}

    def table(self) -> Table:
        """A rich Table."""
        table = Table(title=f"{self.name}: edits against plain hooks on whole sequences", title_justify="left")
        for head, justify in (("mode", "left"), ("verdict", "left"), ("difference", "right"), ("allowed", "right"),
                              ("effect", "right"), ("note", "left")):  # fmt: skip
            table.add_column(head, justify=justify)
        for row in self.rows:
            numbers = (f"{n:.1e}" if n else "" for n in (row.difference, row.allowed, row.effect))
            color = _COLORS[row.verdict]
            table.add_row(row.mode, f"[{color}]{row.verdict}[/]", *numbers, row.note.replace("[", "\\["))
        return table

    def __str__(self):
        console = Console(width=140, color_system=None)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()

    __repr__ = __str__
