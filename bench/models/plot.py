"""The CSV as pictures: for each work a PNG of dots, ratios to the unedited model with their intervals.

    python -m bench.models.plot bench/results/models-cpu.csv
"""

import math
import pathlib
import sys

from . import rows


def ratios(path):
    """A PNG beside the CSV for each work that has figures; returns their paths."""
    found = [r for r in rows.read(path).values() if r["ratio"]]
    works = dict.fromkeys(r["work"] for r in found)
    return [_picture(pathlib.Path(path), work, [r for r in found if r["work"] == work]) for work in works]


def _picture(path, work, found):
    """One panel a size and kind, one line a variant."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes, kinds = (list(dict.fromkeys(r[name] for r in found)) for name in ("size", "kind"))
    variants = list(dict.fromkeys(r["variant"] for r in found))
    shape = {"figsize": (2.2 + 2.4 * len(kinds), 0.9 + len(sizes) * (0.5 + 0.2 * len(variants)))}
    figure, grid = plt.subplots(len(sizes), len(kinds), squeeze=False, sharey=True, sharex="row", **shape)
    for line, size in zip(grid, sizes, strict=True):
        for axes, kind in zip(line, kinds, strict=True):
            _dots(axes, variants, [r for r in found if (r["size"], r["kind"]) == (size, kind)])
            axes.set_title(f"{size}, {kind}", fontsize=8)
    line[0].invert_yaxis()
    figure.supxlabel(f"{work}: time ÷ {'the floor' if work.startswith('training') else 'unedited'}", fontsize=8)
    figure.tight_layout()
    target = path.with_name(f"{path.stem}-{work.replace(' ', '-')}.png")
    figure.savefig(target, dpi=130)
    plt.close(figure)
    return target


def _dots(axes, variants, found):
    for r in found:
        ours, half = r["variant"].startswith("fastedit"), float(r["ratio_95"])
        error = half if math.isfinite(half) else 0.0  # of one process there is no interval
        axes.errorbar(
            float(r["ratio"]), variants.index(r["variant"]), xerr=error, fmt="o", markersize=3.5, capsize=2,
            linewidth=1, color="tab:red" if ours else "tab:gray",
        )  # fmt: skip
    axes.axvline(1, color="black", linewidth=0.6, linestyle="--")
    axes.set_yticks(range(len(variants)), variants, fontsize=6)
    axes.tick_params(axis="x", labelsize=6)
    if not found:
        axes.set_xticks([])


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(*ratios(name), sep="\n")
