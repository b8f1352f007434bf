"""Directions per layer: a probe's accuracy, and how far apart the class means are."""

from . import style

COLOURS = {"accuracy": style.COOL, "fitted_accuracy": style.GREY}
NAMES = {"accuracy": "held-out accuracy", "fitted_accuracy": "accuracy on the texts fitted to"}


def draw(directions, axes=None):
    """Accuracy, where the directions' statistics hold one, and separation, by layer. Returns [matplotlib axes].

    Raises:
        ValueError: directions without statistics.
    """
    return _drawn(directions, style.axes_or_new(axes, 5.5, 3.8, _count(directions)))


def figure(directions):
    """The same as a matplotlib Figure that pyplot does not know."""
    count = _count(directions)
    made = style.figure(5.5 * count, 3.8)
    _drawn(directions, list(made.subplots(1, count, squeeze=False)[0]))
    made.suptitle(f"{directions.about.get('method', 'directions')}, {directions.about.get('at', '')}", fontsize=style.TITLE)
    return made


def write(directions, path):
    """The same into a file: PNG, SVG or PDF."""
    figure(directions).savefig(path, dpi=130)


def _count(directions):
    if not directions.statistics:
        raise ValueError("the directions have no statistics to draw; fastedit.contrast gives them")
    return 1 + ("accuracy" in next(iter(directions.statistics.values())))


def _drawn(directions, axes):
    layers = sorted(directions.statistics)
    if len(axes) == 2:
        for key, name in NAMES.items():
            shares = [100 * directions.statistics[layer][key] for layer in layers]
            axes[0].plot(layers, shares, marker="o", color=COLOURS[key], label=name)
        axes[0].axhline(50, color="#cccccc", linewidth=1, zorder=0)
        axes[0].legend(frameon=False, fontsize=9)
        style.finish(axes[0], x="layer", y="% (50: guessing)")
    found = [directions.statistics[layer]["separation"] or 0.0 for layer in layers]
    axes[-1].bar(layers, found, color=style.WARM, width=0.65)
    style.finish(axes[-1], x="layer", y="distance of the means ÷ spread within")
    for one in axes:
        style.layer_ticks(one, layers)
    return axes
