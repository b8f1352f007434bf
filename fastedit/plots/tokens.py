"""Tokens colored by one number each, as HTML, and a layer × token heat map."""

import html as escape

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

WARM, COOL = (191, 111, 58), (31, 122, 140)


def html(tokens, values):
    """One line of HTML. Each token's background shows its value: warm above 0, cool below, strongest for the
    largest."""
    largest = max((abs(float(value)) for value in values), default=0.0) or 1.0
    spans = []
    for token, value in zip(tokens, values, strict=True):
        red, green, blue = WARM if value > 0 else COOL
        share = abs(float(value)) / largest
        style = f"background: rgba({red},{green},{blue},{share:.2f})"
        spans.append(f'<span class="token" style="{style}" title="{float(value):+.3f}">{escape.escape(token)}</span>')
    return f'<div class="tokens">{"".join(spans)}</div>'


def heat_map(tokens, layers, values):
    """A matplotlib Figure of values (layers, tokens)."""
    figure = Figure(figsize=(max(4, 0.32 * len(tokens) + 1.5), max(2.5, 0.16 * len(layers) + 1.2)), layout="constrained")
    axes = figure.subplots()
    largest = max(abs(float(values.min())), abs(float(values.max()))) or 1.0
    image = axes.imshow(values, aspect="auto", cmap="RdBu_r", vmin=-largest, vmax=largest, origin="lower")
    axes.set_xticks(range(len(tokens)), [token.replace("$", r"\$") for token in tokens], rotation=60, ha="right", fontsize=8)
    step = max(1, len(layers) // 10)
    axes.set_yticks(range(0, len(layers), step), layers[::step])
    axes.set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="cosine")
    return figure
