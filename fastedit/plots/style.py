"""The house style of every picture: colors, axes without boxes, heat maps around a middle, files.

Pictures that are returned are drawn on pyplot's axes, so that a notebook shows them. Those that are written have a
Figure of their own: they choose no backend and leave pyplot's figures alone.
"""

from matplotlib.figure import Figure

COOL, WARM, GREY, PALE, DARK = "#1f7a8c", "#bf6f3a", "#9aa5b1", "#d5dade", "#333333"
CYCLE = (COOL, WARM, "#6b8f3c", "#7d5ba6", GREY)
SMALL, TITLE = 8, 11


def figure(width, height):
    """A Figure that pyplot does not know, in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def axes_or_new(axes, width, height, count=1):
    """[axes]: those given, one or several, or new ones of pyplot side by side."""
    if axes is not None:
        given = list(axes) if hasattr(axes, "__iter__") else [axes]
        if len(given) != count:
            raise ValueError(f"axes has {len(given)} axes, and this picture needs {count}")
        return given
    import matplotlib.pyplot as plt

    made, grid = plt.subplots(1, count, figsize=(width * count, height), layout="constrained", squeeze=False)
    del made
    return list(grid[0])


def finish(axes, *, title=None, x=None, y=None):
    """Labels, and no box."""
    axes.spines[["top", "right"]].set_visible(False)
    if title is not None:
        axes.set_title(title.replace("$", r"\$"), loc="left", fontsize=TITLE)
    if x is not None:
        axes.set_xlabel(x)
    if y is not None:
        axes.set_ylabel(y)
    return axes


def layer_ticks(axes, layers):
    """Ticks of a horizontal axis of layers: all, or every few."""
    axes.set_xticks(layers if len(layers) <= 16 else layers[:: max(1, len(layers) // 8)])


def heat(axes, values, *, label, middle=0.0, largest=None, upwards=True):
    """A heat map of (rows, columns), warm above `middle` and cool below. NaN is left white."""
    if largest is None:
        largest = float((values - middle).nan_to_num().abs().max()) or 1.0
    image = axes.imshow(
        values, aspect="auto", cmap="RdBu_r", vmin=middle - largest, vmax=middle + largest, interpolation="nearest",
        origin="lower" if upwards else "upper",
    )  # fmt: skip
    axes.figure.colorbar(image, ax=axes, shrink=0.9, label=label)
    return axes


def row_ticks(axes, names, most=24):
    """Ticks of a vertical axis of named rows: all, or every few."""
    step = max(1, -(-len(names) // most))
    axes.set_yticks(range(0, len(names), step), list(names)[::step], fontsize=SMALL)


def token_ticks(axes, tokens):
    axes.set_xticks(range(len(tokens)), [token.replace("$", r"\$") for token in tokens], rotation=60, ha="right", fontsize=SMALL)


def write(axes, path):
    """Save the picture that the axes are in: PNG, SVG or PDF by the name's end."""
    axes.figure.savefig(path, dpi=130)
