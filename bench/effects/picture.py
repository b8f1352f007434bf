"""The README's picture: a chat model's replies at three doses, what each dose does, and what a step costs.

    python -m bench.effects.picture docs/doses.png

Drawn from bench/results: effects-chat.csv (bench/effects/chat.py, which says how the replies were made) and models-cpu.csv
(bench/models). The replies are those to the first prompt with the last seed, cut where the study cuts them.
"""

import argparse
import csv
import hashlib
import textwrap
from pathlib import Path

from fastedit import examples
from fastedit.methods.replies import wilson
from fastedit.plots import style

RESULTS = Path(__file__).parents[1] / "results"
DOSES, SHOWN, SEED = ("0.1", "0.2", "0.4"), ("0", "0.2", "0.4"), "2"
SHADES = {"0": style.GREY, "0.1": "#e0bfa3", "0.2": "#cf966c", "0.4": style.WARM}
CONTROLS = {"random": "random direction", "shuffled": "shuffled labels"}
PATHS = {
    "unedited": "no edit", "fastedit": "fastedit", "hook": "PyTorch hook", "steering-vectors": "steering-vectors",
    "repeng": "repeng", "pyvene": "pyvene",
}  # fmt: skip


def rows(name, **wanted):
    with (RESULTS / name).open(newline="") as file:
        return [row for row in csv.DictReader(file) if all(row[key] == value for key, value in wanted.items())]


def shares():
    """{(condition, dose): (% of replies that are happier, (low, high))}, over all seeds."""
    counted = {}
    for row in rows("effects-chat.csv", study="mood"):
        hits, of = counted.get((row["condition"], row["dose"]), (0, 0))
        counted[row["condition"], row["dose"]] = hits + int(row["hits"]), of + int(row["replies"])
    return {
        key: (100 * hits / of, tuple(100 * end for end in wilson(hits, of))) for key, (hits, of) in counted.items()
    }  # fmt: skip


def costs():
    """{path: (time of a decode step, unedited is 1; its 95 % interval's half)} of a steering vector on every layer."""
    found = {row["variant"]: row for row in rows("models-cpu.csv", size="256x8", kind="steer", work="decode")}
    return {path: (float(found[path]["ratio"]), float(found[path]["ratio_95"])) for path in PATHS}


def said():
    """{dose: reply}; dose "0" is no edit."""
    some = rows("effects-chat.csv", study="mood", seed=SEED)
    return {row["dose"]: row["example"] for row in some if row["condition"] in ("none", "direction")}


def digest():
    """Of all that is shown; the PNG holds it, so that a test sees whether the picture is that of the results."""
    return hashlib.sha256(repr((sorted(shares().items()), costs(), sorted(said().items()))).encode()).hexdigest()


def draw(path):
    figure = style.figure(13, 4.3)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.5, 1.15, 1))
    _replies(left)
    _effect(middle)
    _cost(right)
    figure.savefig(path, dpi=110, metadata={"Source": digest()})


def _replies(axes):
    axes.axis("off")
    axes.set_title(f"“{examples.lines(examples.PROMPTS)[0]}”", loc="left", fontsize=style.TITLE)
    replies = said()
    for place, dose in enumerate(SHOWN):
        top = 0.95 - place * 0.33
        axes.text(
            0.0, top, f" {dose} nats " if dose != "0" else " no edit ", transform=axes.transAxes, va="top", fontsize=9,
            bbox={"facecolor": SHADES[dose], "edgecolor": "none", "pad": 3},
        )  # fmt: skip
        axes.text(0.19, top, textwrap.fill(f"{replies[dose]} …", 44), transform=axes.transAxes, va="top", fontsize=10)


def _effect(axes):
    found = shares()
    bars = [("none", "0", "no edit", style.GREY)]
    bars += [("direction", dose, dose, SHADES[dose]) for dose in DOSES]
    bars += [(name, "0.4", f"{label}\n0.4", style.PALE) for name, label in CONTROLS.items()]
    for place, (condition, dose, _, color) in enumerate(bars):
        share, (low, high) = found[condition, dose]
        axes.bar(place, share, color=color, width=0.7, yerr=[[share - low], [high - share]], capsize=3, ecolor=style.DARK)
    axes.set_xticks(range(len(bars)), [label.replace(" ", "\n") for _, _, label, _ in bars], fontsize=style.SMALL)
    axes.set_ylim(0, 100)
    style.finish(axes, title="Effect: happier replies, %", x="dose, nats per token")


def _cost(axes):
    found = list(costs().items())[::-1]
    for place, (path, (ratio, half)) in enumerate(found):
        color = {"fastedit": style.WARM, "unedited": style.GREY}.get(path, style.PALE)
        axes.barh(place, ratio, color=color, height=0.7, xerr=half, capsize=3, ecolor=style.DARK)
        axes.text(0.03, place, f"{ratio:.2f}", va="center", fontsize=9)
    axes.axvline(1, color=style.DARK, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(found)), [PATHS[path] for path, _ in found], fontsize=9)
    style.finish(axes, title="Cost: time of a decode step", x="no edit = 1 (a Llama of width 256, CPU)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    draw(parser.parse_args().path)
