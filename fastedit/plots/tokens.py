"""Tokens colored by one number each, as HTML, and a layer × token heat map."""

import html as escape

from . import style

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
    made = style.figure(max(4, 0.32 * len(tokens) + 1.5), max(2.5, 0.16 * len(layers) + 1.2))
    axes = style.heat(made.subplots(), values, label="cosine")
    style.token_ticks(axes, tokens)
    style.row_ticks(axes, layers, most=10)
    style.finish(axes, y="layer")
    return made
