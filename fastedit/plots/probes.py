"""What a probe read, token by layer: a heat map as PNG."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def heat_map(readings, path, *, tokens=None, layers=None, sequence=0, probe=0, title="what the probe reads"):
    """Draw one sequence's reading of one probe: layers upward, tokens to the right.

    Args:
        readings: (layers, batch, tokens, probes), one of `handle.readings`.
        path: of the PNG.
        tokens: their texts, as many as were read. None for numbers. layers: their numbers. None to count from 0.
        sequence, probe: which one of the batch, and of the probes.

    Raises:
        ValueError: readings of another shape, or another number of tokens or layers.
    """
    if readings.dim() != 4:
        raise ValueError(f"readings has shape {tuple(readings.shape)}, expected (layers, batch, tokens, probes)")
    shown = readings[:, sequence, :, probe].float().cpu()
    for name, given, expected in (("layers", layers, len(shown)), ("tokens", tokens, shown.shape[1])):
        if given is not None and len(given) != expected:
            raise ValueError(f"{name} has {len(given)} names, but the readings have {expected}")
    figure, axes = plt.subplots(
        figsize=(min(4 + 0.28 * shown.shape[1], 24), min(2 + 0.22 * len(shown), 16)), layout="constrained"
    )
    limit = shown.abs().max().item() or 1.0
    image = axes.imshow(
        shown, aspect="auto", origin="lower", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest"
    )
    if tokens is not None:
        axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=8)
    if layers is not None:
        axes.set_yticks(range(len(layers)), layers, fontsize=8)
    axes.set_xlabel("token")
    axes.set_ylabel("layer")
    axes.set_title(title, loc="left", fontsize=11)
    figure.colorbar(image, ax=axes, shrink=0.9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
