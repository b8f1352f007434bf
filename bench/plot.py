"""Pictures from the CSVs alone: they regenerate without measuring again."""

import csv
import pathlib
import sys


def roofline(path):
    """Share of the copy bandwidth that each op reaches, ours beside its peers; returns the PNG's path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in csv.DictReader(pathlib.Path(path).open()) if r["backend"] != "copy"]
    largest = {}
    for r in rows:  # the largest case of each op, mode and dtype: where bandwidth and not the call is the limit
        key = (r["op"], r["mode"], r["dtype"])
        if r["rank"] == "0" or r["op"] == "project":
            largest[key] = max(largest.get(key, 0), int(r["bytes"]))
    labels, bars = [], {}
    for (op, mode, dtype), size in sorted(largest.items()):
        labels.append(f"{op}\n{mode} {dtype}")
        for r in rows:
            if (r["op"], r["mode"], r["dtype"], int(r["bytes"])) == (op, mode, dtype, size) and r["slots"] == "1":
                bars.setdefault(r["backend"], {})[len(labels) - 1] = float(r["share_of_copy"])
    figure, axes = plt.subplots(figsize=(max(8, 0.9 * len(labels)), 4.5))
    step = 0.8 / max(1, len(bars))
    for i, (name, heights) in enumerate(sorted(bars.items())):
        axes.bar([at + i * step for at in heights], heights.values(), step, label=name)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_xticks([i + 0.4 - step / 2 for i in range(len(labels))], labels, fontsize=6)
    axes.set_ylabel("share of the copy bandwidth")
    axes.set_title("each op at its largest size against a plain copy of the same bytes")
    axes.legend(fontsize=7)
    figure.tight_layout()
    target = pathlib.Path(path).with_suffix(".png")
    figure.savefig(target, dpi=130)
    plt.close(figure)
    return target


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(roofline(name))
