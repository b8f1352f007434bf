"""What edits hold, by layer: scale − 1 and bias by feature, and how long the rows of low-rank factors are."""

import re

import torch

from . import style

_NAME = re.compile(r"(\d+)\.(.+)\.(\w+)\.(\w+)")
LABELS = {"scale": "scale − 1", "bias": "bias", "read": "‖read‖ by rank", "write": "‖write‖ by rank"}


def draw(tensors, axes=None):
    """A heat map per edit and kind of tensor: layers upwards; features, or ranks, to the right.

    Args:
        tensors: {"0.layers.3.mlp.scale": tensor}, as `handle.named_tensors()` has them.
        axes: matplotlib's, as many as there are pictures; None for new ones.

    Returns:
        [matplotlib axes].

    Raises:
        ValueError: there is nothing to draw, or tenants, whose tensors have a dimension more.
    """
    pictures = _pictures(tensors)
    made = style.axes_or_new(axes, 5.5, 3.8, len(pictures))
    for one, ((number, site, name), rows) in zip(made, pictures.items(), strict=True):
        values = torch.stack(list(rows.values()))
        largest = float(values.abs().quantile(0.99)) if values.numel() < 1 << 24 else None
        style.heat(one, values, label=LABELS[name], largest=largest or None)
        style.row_ticks(one, [layer.removeprefix("layers.") for layer in rows])
        style.finish(one, title=f"edit {number} at {site}", x="rank" if name in ("read", "write") else "feature", y="layer")
    return made


def _pictures(tensors):
    """{(edit, site, name): {layer: fp32 row}} of the tensors that have a picture."""
    found = {}
    for key, tensor in tensors.items():
        match = _NAME.fullmatch(key)
        if match is None or match[4] not in LABELS:
            continue
        number, layer, site, name = match.groups()
        low_rank = name in ("read", "write")
        if tensor.dim() != 1 + low_rank:
            raise ValueError(f"{key} has shape {tuple(tensor.shape)}: of tenants, draw one, handle.named_tensors(tenant=0)")
        row = tensor.detach().float().cpu()
        found.setdefault((number, site, name), {})[layer] = row.norm(dim=-1) if low_rank else row - float(name == "scale")
    if not found:
        raise ValueError("these edits hold no scale, bias, read or write to draw")
    return found
