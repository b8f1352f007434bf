"""The demo's pictures: replies of a steered chat model; accuracy beside parameters, and what RED did to each layer."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

COLOURS = ("#9aa5b1", "#1f7a8c", "#bf6f3a")


def draw(results, tensors, path):
    """results: {name: (accuracy, parameters)}. tensors: of a RED handle. Writes a PNG."""
    figure, (bars, map_) = plt.subplots(1, 2, figsize=(12, 4.2), width_ratios=(1, 1.5), layout="constrained")
    _accuracy(bars, results)
    _scales(figure, map_, tensors)
    figure.savefig(path, dpi=130)
    plt.close(figure)


CHAT_COLORS = {"-dose": "#41658a", "none": "#9aa5b1", "+dose": "#bf6f3a"}
CHAT_NAMES = {
    "-dose": "minus\nthe dose", "none": "no edit", "+dose": "plus\nthe dose", "random": "random direction,\nsame KL",
    "shuffled": "shuffled labels,\nsame KL",
}  # fmt: skip


def draw_chat(shares, path):
    """shares: {name: (share, (low, high))}, of replies that are happier. Writes a PNG: bars with 95 % intervals."""
    figure, axes = plt.subplots(figsize=(6.6, 3.8), layout="constrained")
    values = [100 * share for share, _ in shares.values()]
    below = [max(0.0, 100 * (share - low)) for share, (low, _) in shares.values()]
    above = [max(0.0, 100 * (high - share)) for share, (_, high) in shares.values()]
    colors = [CHAT_COLORS.get(name, "#d5dade") for name in shares]
    axes.bar(range(len(shares)), values, color=colors, width=0.65, yerr=(below, above), capsize=4, ecolor="#333333")
    axes.set_xticks(range(len(shares)), [CHAT_NAMES.get(name, name) for name in shares], fontsize=9)
    axes.set_ylabel("% of replies with more happy\nwords than sad ones")
    axes.set_ylim(0, 105)
    axes.set_title("A chat model, steered", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _accuracy(axes, results):
    shares = [100 * share for share, _ in results.values()]
    drawn = axes.bar(range(len(results)), shares, color=COLOURS, width=0.65)
    for bar, share, (_, parameters) in zip(drawn, shares, results.values(), strict=True):
        label = f"{share:.1f} %\n{parameters:,} numbers" if parameters else f"{share:.1f} %"
        axes.annotate(label, (bar.get_x() + bar.get_width() / 2, share), ha="center", va="bottom", fontsize=9)
    axes.set_xticks(range(len(results)), results)
    axes.set_ylim(min(50, min(shares) - 5), max(shares) + 6)
    axes.set_ylabel("held-out accuracy, % (50: guessing)")
    axes.set_title("Are two words swapped?", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)


def _scales(figure, axes, tensors):
    names = sorted((n for n in tensors if n.endswith(".scale")), key=lambda n: int(n.split(".")[-3]))
    change = torch.stack([tensors[name].cpu() - 1 for name in names])
    limit = change.abs().quantile(0.99).item() or 1.0
    image = axes.imshow(
        change, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest"
    )
    axes.set_yticks(range(len(names)), [name.split(".")[-3] for name in names])
    axes.set_ylabel("layer")
    axes.set_xlabel("feature")
    axes.set_title("What RED learned: scale − 1", loc="left", fontsize=11)
    figure.colorbar(image, ax=axes, shrink=0.9)
