"""A sweep over layers and doses as a heat map."""

import torch

from . import style

UNITS = {"strength": "strength", "residual": "× the residual's norm", "kl": "KL, nats"}


def draw(found, names, axes=None):
    """The means in the cells; the mean without an edit is the middle of the scale. Returns matplotlib axes.

    found: a fastedit.Sweep. names: (layers) → text.
    """
    rows, columns = _grid(found)
    (axes,) = style.axes_or_new(axes, *_size(rows, columns))
    return _drawn(found, names, axes)


def write(found, names, path):
    """The same into a file: PNG, SVG or PDF."""
    made = style.figure(*_size(*_grid(found)))
    _drawn(found, names, made.subplots())
    made.savefig(path, dpi=130)


def _grid(found):
    return list(dict.fromkeys(cell.layers for cell in found.cells)), list(dict.fromkeys(cell.dose for cell in found.cells))


def _size(rows, columns):
    return min(2.5 + 0.8 * len(columns), 16), min(1.8 + 0.32 * len(rows), 16)


def _drawn(found, names, axes):
    rows, columns = _grid(found)
    means = {(cell.layers, cell.dose): cell.mean for cell in found.cells}
    values = torch.tensor([[means[row, column] for column in columns] for row in rows], dtype=torch.float64)
    style.heat(axes, values, label="mean of the measure", middle=found.base.mean, upwards=False)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            axes.text(x, y, f"{value:.3g}", ha="center", va="center", fontsize=style.SMALL)
    axes.set_xticks(range(len(columns)), [f"{column:g}" for column in columns])
    axes.set_yticks(range(len(rows)), [names(row) for row in rows])
    return style.finish(axes, title=f"no edit: {found.base.mean:.3g}", x=UNITS[found.unit], y="layers")
