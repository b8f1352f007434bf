"""Directions per layer: a probe's accuracy, and how far apart the class means are."""

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

COLOURS = {"accuracy": "#1f7a8c", "fitted_accuracy": "#9aa5b1", "separation": "#bf6f3a"}
NAMES = {"accuracy": "held-out accuracy", "fitted_accuracy": "accuracy on the texts fitted to"}


def draw(directions, path):
    """Writes a PNG. Accuracies are drawn if the directions' statistics have them."""
    figure(directions).savefig(path, dpi=130)


def figure(directions):
    """The same as a matplotlib Figure.

    Raises:
        ValueError: directions without statistics.
    """
    layers = sorted(directions.statistics)
    if not layers:
        raise ValueError("the directions have no statistics to draw; fastedit.contrast gives them")
    with_accuracy = "accuracy" in directions.statistics[layers[0]]
    count = 2 if with_accuracy else 1
    drawn = Figure(figsize=(5.5 * count, 3.8), layout="constrained")
    axes = drawn.subplots(1, count, squeeze=False)
    if with_accuracy:
        _accuracy(axes[0, 0], directions, layers)
    _separation(axes[0, -1], directions, layers)
    drawn.suptitle(f"{directions.about.get('method', 'directions')}, {directions.about.get('at', '')}", fontsize=11)
    return drawn


def _accuracy(axes, directions, layers):
    for key, name in NAMES.items():
        shares = [100 * directions.statistics[layer][key] for layer in layers]
        axes.plot(layers, shares, marker="o", color=COLOURS[key], label=name)
    axes.axhline(50, color="#cccccc", linewidth=1, zorder=0)
    axes.set_ylabel("% (50: guessing)")
    axes.legend(frameon=False, fontsize=9)
    _finish(axes, layers)


def _separation(axes, directions, layers):
    found = [directions.statistics[layer]["separation"] or 0.0 for layer in layers]
    axes.bar(layers, found, color=COLOURS["separation"], width=0.65)
    axes.set_ylabel("distance of the means ÷ spread within")
    _finish(axes, layers)


def _finish(axes, layers):
    axes.set_xlabel("layer")
    axes.set_xticks(layers if len(layers) <= 16 else layers[:: len(layers) // 8])
    axes.spines[["top", "right"]].set_visible(False)
