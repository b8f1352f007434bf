"""What a probe read, token by layer: a heat map."""

from . import style


def draw(readings, *, tokens=None, layers=None, sequence=0, probe=0, title="what the probe reads", axes=None):
    """One sequence's reading of one probe, layers upwards, tokens to the right. Returns matplotlib axes.

    Args:
        readings: (layers, batch, tokens, probes), one of `handle.readings`.
        tokens: their texts, as many as were read; None for numbers. layers: their numbers; None to count from 0.
        sequence, probe: which of the batch, and of the probes.

    Raises:
        ValueError: readings of another shape, or another number of tokens or layers.
    """
    shown = _shown(readings, tokens, layers, sequence, probe)
    (axes,) = style.axes_or_new(axes, *_size(shown))
    return _drawn(shown, tokens, layers, title, axes)


def heat_map(readings, path, *, tokens=None, layers=None, sequence=0, probe=0, title="what the probe reads"):
    """The same into a file: PNG, SVG or PDF."""
    shown = _shown(readings, tokens, layers, sequence, probe)
    made = style.figure(*_size(shown))
    _drawn(shown, tokens, layers, title, made.subplots())
    made.savefig(path, dpi=130)


def _shown(readings, tokens, layers, sequence, probe):
    if readings.dim() != 4:
        raise ValueError(f"readings has shape {tuple(readings.shape)}, expected (layers, batch, tokens, probes)")
    shown = readings[:, sequence, :, probe].float().cpu()
    for name, given, expected in (("layers", layers, len(shown)), ("tokens", tokens, shown.shape[1])):
        if given is not None and len(given) != expected:
            raise ValueError(f"{name} has {len(given)} names, but the readings have {expected}")
    return shown


def _size(shown):
    return min(4 + 0.28 * shown.shape[1], 24), min(2 + 0.22 * len(shown), 16)


def _drawn(shown, tokens, layers, title, axes):
    style.heat(axes, shown, label="projection")
    if tokens is not None:
        style.token_ticks(axes, tokens)
    style.row_ticks(axes, range(len(shown)) if layers is None else layers)
    return style.finish(axes, title=title, x="token", y="layer")
