"""The demo's pictures: replies of a steered chat model; accuracy beside parameters, and what RED did to each layer."""


from . import edits, style

COLOURS = (style.GREY, style.COOL, style.WARM)


def draw(results, tensors, path):
    """results: {name: (accuracy, parameters)}. tensors: of a RED handle. Writes a PNG."""
    figure = style.figure(12, 4.2)
    bars, map_ = figure.subplots(1, 2, width_ratios=(1, 1.5))
    _accuracy(bars, results)
    edits.draw({name: tensor for name, tensor in tensors.items() if name.endswith(".scale")}, [map_])
    style.finish(map_, title="What RED learned: scale − 1")
    figure.savefig(path, dpi=130)


CHAT_COLOURS = {"-dose": style.COOL, "none": style.GREY, "+dose": style.WARM}
CHAT_NAMES = {
    "-dose": "minus\nthe dose", "none": "no edit", "+dose": "plus\nthe dose", "random": "random direction,\nsame KL",
    "shuffled": "shuffled labels,\nsame KL",
}  # fmt: skip


def draw_chat(shares, path):
    """shares: {name: (share, (low, high))}, of replies that are happier. Writes a PNG: bars with 95 % intervals."""
    figure = style.figure(6.6, 3.8)
    axes = figure.subplots()
    values = [100 * share for share, _ in shares.values()]
    below = [max(0.0, 100 * (share - low)) for share, (low, _) in shares.values()]
    above = [max(0.0, 100 * (high - share)) for share, (_, high) in shares.values()]
    colours = [CHAT_COLOURS.get(name, style.PALE) for name in shares]
    axes.bar(range(len(shares)), values, color=colours, width=0.65, yerr=(below, above), capsize=4, ecolor=style.DARK)
    axes.set_xticks(range(len(shares)), [CHAT_NAMES.get(name, name) for name in shares], fontsize=9)
    axes.set_ylim(0, 105)
    style.finish(axes, title="A chat model, steered", y="% of replies with more happy\nwords than sad ones")
    figure.savefig(path, dpi=130)


def _accuracy(axes, results):
    shares = [100 * share for share, _ in results.values()]
    drawn = axes.bar(range(len(results)), shares, color=COLOURS, width=0.65)
    for bar, share, (_, parameters) in zip(drawn, shares, results.values(), strict=True):
        label = f"{share:.1f} %\n{parameters:,} numbers" if parameters else f"{share:.1f} %"
        axes.annotate(label, (bar.get_x() + bar.get_width() / 2, share), ha="center", va="bottom", fontsize=9)
    axes.set_xticks(range(len(results)), results)
    axes.set_ylim(min(50, min(shares) - 5), max(shares) + 6)
    style.finish(axes, title="Are two words swapped?", y="held-out accuracy, % (50: guessing)")
