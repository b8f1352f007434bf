"""Which layers, and how strongly: a grid of steering edits, each judged by a measure of yours.

    found = fastedit.sweep(model, directions, measure, layers=[range(8, 12), range(12, 16)], doses=[0.5, 1, 2])
    print(found); found.heat_map("sweep.png"); fastedit.patch(model, found.edit(found.best()))
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..arguments import FP32_MAX, as_list, check_flag, check_whole
from ..edits.kinds import Steer
from ..files.edit_file import replace
from ..files.sealed import VERSION, open_json, read_regular, seal_json
from ..hints import Folder, Site
from ..patching.handle import patch
from .directions import Directions
from .dose import calibrate

logger = logging.getLogger("fastedit")

UNITS = ("strength", "residual", "kl")


@dataclass(frozen=True)
class Cell:
    """layers: those steered. dose: as asked. strength: of the edit. mean, low, high: of `count` values, the 95 %
    interval.

    control: the same for a random direction, {"mean", "low", "high"}, or None.
    """

    layers: tuple
    dose: float
    strength: float
    mean: float
    low: float
    high: float
    count: int
    control: dict | None = None


def sweep(
    model: nn.Module, directions: Directions, measure: Callable[[Any], torch.Tensor | Sequence[float]], *,
    doses: Iterable[float], layers: Iterable[int | Sequence[int]] | None = None,
    unit: Literal["strength", "residual", "kl"] = "strength", site: Site = "block", control: bool = False, seed: int = 0,
    resume: Folder | None = None, progress: bool | None = None, **calibration: Any,
) -> Sweep:  # fmt: skip
    """Steer at several sets of layers with several doses, and let `measure` judge each.

    Args:
        directions: Directions, as from `fastedit.contrast`.
        measure: measure(model) → numbers, one per prompt or sample: a tensor or a list. Zeros and ones are taken as a
            share.
        doses: numbers. The grid also has one cell without an edit.
        layers: a list of layer numbers, each alone, or of ranges or tuples, each together. None for every layer alone.
        site: where in a layer the directions are added; "block" by default.
        unit: of the doses. "strength": of the edit, as it is. "residual": times the residual's norm
            (`Directions.relative`). "kl": the mean KL that `fastedit.calibrate` reaches. Its other arguments are passed
            on (prompts=, tokenizer=, new_tokens=, …).
        control: also measure a random direction of the same length at each layer, with the same dose in the same unit.
        seed: of the control. resume: a folder. Cells that are in it are not measured again.
        progress: a bar. None: on a terminal.

    Returns:
        Sweep.

    Raises:
        TypeError, ValueError: no doses, a unit or layer that does not exist, a measure that gives no finite numbers, a
        folder that holds another grid, and what `calibrate` refuses.
    """
    grid, doses = _checked(directions, layers, doses, unit, control, seed, calibration)
    key = {
        "directions": _digest(directions), "site": site, "unit": unit, "control": control, "seed": seed,
        "calibration": {name: repr(value) for name, value in sorted(calibration.items()) if name != "tokenizer"},
    }  # fmt: skip
    kept = _Kept(resume, key)
    with _bar(progress, 1 + len(grid) * len(doses)) as advance:
        base = kept.get((), 0.0) or kept.add(Cell((), 0.0, 0.0, *_summary(measure(model))))
        advance()
        cells = []
        for chosen in grid:
            for dose in doses:
                cell = kept.get(chosen, dose)
                if cell is None:
                    own = directions.at(*chosen)
                    strength, found = _judged(model, own, dose, unit, site, measure, calibration)
                    other = None
                    if control:
                        _, drawn = _judged(model, random_like(own, seed), dose, unit, site, measure, calibration)
                        other = dict(zip(("mean", "low", "high"), drawn, strict=False))
                    cell = kept.add(Cell(chosen, dose, strength, *found, other))
                cells.append(cell)
                advance()
    return Sweep(directions, site, unit, base, cells)


def random_like(directions, seed):
    """Random directions, each layer's as long as the given one."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {layer: torch.randn(len(vector), generator=generator) for layer, vector in directions.items()}
    made = {layer: v * (directions[layer].norm() / v.norm()) for layer, v in drawn.items()}
    return Directions(made, directions.statistics, directions.about)


def _judged(model, directions, dose, unit, site, measure, calibration):
    strength = dose
    if unit == "residual":
        directions, strength = directions.relative(dose), 1.0
    with patch(model, Steer(directions, site=site)) as handle:
        if unit == "kl":
            strength = calibrate(model, handle, target_kl=dose, **calibration).strength
        handle.strength = strength
        return strength, _summary(measure(model))


def _summary(values):
    """(mean, low, high, count): Wilson's interval for zeros and ones, else the normal one."""
    values = torch.as_tensor(values).detach().double().flatten().cpu()
    if not len(values) or not values.isfinite().all():
        raise ValueError(f"measure gave {len(values)} numbers, expected one or more, all finite")
    mean, count = values.mean().item(), len(values)
    if bool(((values == 0) | (values == 1)).all()):
        square = 1.96**2 / count
        centre, half = mean + square / 2, 1.96 * math.sqrt(mean * (1 - mean) / count + square / (4 * count))
        return mean, max(0.0, (centre - half) / (1 + square)), min(1.0, (centre + half) / (1 + square)), count
    half = 1.96 * values.std().item() / math.sqrt(count) if count > 1 else math.inf
    return mean, mean - half, mean + half, count


class Sweep:
    """What `sweep` found. base: the Cell without an edit. cells: the others, by layers, then by doses."""

    def __init__(self, directions: Directions, site: Site, unit: str, base: Cell, cells: list[Cell]) -> None:
        self.directions, self.site, self.unit, self.base, self.cells = directions, site, unit, base, cells

    def best(self, largest: bool = True) -> Cell:
        """The Cell with the largest mean, or the smallest."""
        check_flag("largest", largest)
        return (max if largest else min)(self.cells, key=lambda cell: cell.mean)

    def edit(self, cell: Cell) -> Steer:
        """The Steer of a cell, at the strength at which it was measured."""
        own = self.directions.at(*cell.layers)
        if self.unit == "residual":
            return Steer(own.relative(cell.dose), site=self.site)
        return Steer(own, site=self.site, strength=cell.strength)

    def plot(self, axes: Any = None) -> Any:
        """Draw the means into matplotlib axes, or new ones: one row per set of layers and one column per dose.
        Returns the axes.
        """
        from ..plots.sweep import draw

        return draw(self, layers_text, axes)

    def heat_map(self, path: Folder) -> None:
        """`plot` into the file at path: PNG, SVG or PDF by the name's end."""
        from ..plots.sweep import write

        write(self, layers_text, path)

    def json(self) -> dict[str, Any]:
        """JSON-able: the unit, the cell without an edit and the others."""
        return {"unit": self.unit, "base": asdict(self.base), "cells": [asdict(cell) for cell in self.cells]}

    def __str__(self):
        lines = [f"{'layers':>10} {self.unit:>9} {'mean':>9}   95 % interval          random direction"]
        for cell in [self.base, *self.cells]:
            other = "" if cell.control is None else "{mean:9.4g} ({low:.4g} to {high:.4g})".format(**cell.control)
            span = f"({cell.low:.4g} to {cell.high:.4g})"
            lines.append(f"{layers_text(cell.layers):>10} {cell.dose:9g} {cell.mean:9.4g}   {span:<22} {other}".rstrip())
        return "\n".join(lines)


def layers_text(layers):
    """"8–11" for neighbors, "none" for none."""
    if not layers:
        return "none"
    if len(layers) > 1 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}–{layers[-1]}"
    return ",".join(map(str, layers))


def _checked(directions, layers, doses, unit, control, seed, calibration):
    if not isinstance(directions, Directions):
        raise TypeError(f"directions is {type(directions).__name__}, expected fastedit.Directions")
    if unit not in UNITS:
        raise ValueError(f"unit is {unit!r}, expected one of {', '.join(map(repr, UNITS))}")
    if calibration and unit != "kl":
        raise TypeError(f"{', '.join(calibration)}: of unit='kl' alone, and unit is {unit!r}")
    if unit == "kl" and "prompts" not in calibration:
        raise ValueError("unit='kl' needs prompts=, on which fastedit.calibrate measures")
    check_whole("seed", seed, least=0)
    check_flag("control", control)
    doses = as_list("doses", doses, "a list of numbers")
    if not doses or not all(isinstance(d, (int, float)) and not isinstance(d, bool) and abs(d) <= FP32_MAX for d in doses):
        raise ValueError(f"doses is {doses!r:.60}, expected one finite number or more")
    what = "layer numbers, or ranges or tuples of them"
    grid = directions.layers if layers is None else as_list("layers", layers, f"a list of {what}")
    grid = [(chosen,) if isinstance(chosen, int) else tuple(as_list("layers", chosen, what)) for chosen in grid]
    missing = sorted({layer for chosen in grid for layer in chosen} - set(directions))
    if missing or not grid or not all(grid):
        found = f"layers {missing} have no direction; there are {directions.layers}" if missing else "an empty set of layers"
        raise ValueError(f"layers is {grid!r:.60}: {found}")
    return grid, [float(dose) for dose in doses]


def _digest(directions):
    digest = hashlib.sha256()
    for layer, vector in directions.items():
        digest.update(f"{layer} ".encode() + vector.numpy().tobytes())
    return digest.hexdigest()


class _Kept:
    """Cells in a file that is replaced whole after each one."""

    def __init__(self, folder, key):
        self.path, self.key, self.cells = None if folder is None else Path(folder) / "sweep.json", key, {}
        if self.path is None or not self.path.exists():
            return
        try:
            note, version = open_json(read_regular(self.path, 1 << 30), ("key", "cells"))
            found, cells = note["key"], [Cell(**cell | {"layers": tuple(cell["layers"])}) for cell in note["cells"]]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path} is not what fastedit.sweep writes: {error!r}; remove it") from None
        if version == 1:
            logger.warning("fastedit: %s is of format version 1, which has no checksum; its next cell gives it one", self.path)
        if found != key:
            raise ValueError(f"{self.path} is of another sweep ({_differences(found, key)}); remove it, or resume elsewhere")
        self.cells = {(cell.layers, cell.dose): cell for cell in cells}

    def get(self, layers, dose):
        return self.cells.get((layers, dose))

    def add(self, cell):
        self.cells[cell.layers, cell.dose] = cell
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            note = {"version": VERSION, "key": self.key, "cells": [asdict(cell) for cell in self.cells.values()]}
            replace(self.path, seal_json(note, finite=False))  # the interval of one number is infinite
        return cell


def _differences(found, key):
    if not isinstance(found, dict):
        return "no key"
    return ", ".join(f"{name} {found.get(name)!r}" for name in key if found.get(name) != key[name])


@contextlib.contextmanager
def _bar(progress, total):
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not (console.is_terminal if progress is None else progress):
        yield lambda: None
        return
    with Progress(console=console, transient=True) as bars:
        task = bars.add_task("sweep", total=total)
        yield lambda: bars.advance(task)
