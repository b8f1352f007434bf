"""The picture of an Explanation: which tokens were edited, and how strongly."""

import torch

from . import style


def draw(explanation, tokenizer=None, axes=None):
    """matplotlib axes: one line per edit and row of the batch, one column per token."""
    groups = {}
    for one in explanation.told:
        for row, factor in enumerate(one.factor.flatten(1) if one.factor.dim() > 2 else one.factor):
            groups.setdefault((f"{one.number} {one.edit} at {one.site}, row {row}", factor.numel()), []).append(factor)
    columns = max(count for _, count in groups)
    picture = torch.full((len(groups), columns), float("nan"))
    for line, ((_, count), factors) in enumerate(groups.items()):
        picture[line, :count] = torch.stack(factors).mean(0)
    (axes,) = style.axes_or_new(axes, 2 + 0.35 * columns, 1 + 0.35 * len(groups))
    style.heat(axes, picture, label="factor on the edit, mean over layers", upwards=False)
    axes.set_yticks(range(len(groups)), [name for name, _ in groups])
    ids = explanation.input_ids
    if tokenizer is not None and ids is not None:
        style.token_ticks(axes, tokenizer.convert_ids_to_tokens(ids[0].tolist()))
    return style.finish(axes, x="token")
