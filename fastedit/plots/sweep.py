"""A sweep over layers and doses as a heat map."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(found, path, names):
    """Writes a PNG: the means in the cells; the mean without an edit is the middle of the scale.

    found: a fastedit.Sweep. names: (layers) → text.
    """
    rows = list(dict.fromkeys(cell.layers for cell in found.cells))
    columns = list(dict.fromkeys(cell.dose for cell in found.cells))
    means = {(cell.layers, cell.dose): cell.mean for cell in found.cells}
    values = [[means[row, column] for column in columns] for row in rows]
    apart = max(abs(value - found.base.mean) for row in values for value in row) or 1.0
    figure, axes = plt.subplots(
        figsize=(min(2.5 + 0.8 * len(columns), 16), min(1.8 + 0.32 * len(rows), 16)), layout="constrained"
    )
    image = axes.imshow(
        values, aspect="auto", cmap="RdBu_r", vmin=found.base.mean - apart, vmax=found.base.mean + apart, interpolation="nearest"
    )
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            axes.text(x, y, f"{value:.3g}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(columns)), [f"{column:g}" for column in columns])
    axes.set_yticks(range(len(rows)), [names(row) for row in rows])
    axes.set_xlabel({"strength": "strength", "residual": "× the residual's norm", "kl": "KL, nats"}[found.unit])
    axes.set_ylabel("layers")
    axes.set_title(f"no edit: {found.base.mean:.3g}", loc="left", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
