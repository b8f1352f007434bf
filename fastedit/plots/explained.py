"""The picture of an Explanation: which tokens were edited, and how strongly."""


def draw(explanation, tokenizer=None, axes=None):
    """matplotlib axes: one line per edit and row of the batch, one column per token."""
    import matplotlib.pyplot as plt
    import torch

    groups = {}
    for one in explanation.told:
        for row, factor in enumerate(one.factor.flatten(1) if one.factor.dim() > 2 else one.factor):
            groups.setdefault((f"{one.number} {one.edit} at {one.site}, row {row}", factor.numel()), []).append(factor)
    columns = max(count for _, count in groups)
    picture = torch.full((len(groups), columns), float("nan"))
    for line, ((_, count), factors) in enumerate(groups.items()):
        picture[line, :count] = torch.stack(factors).mean(0)
    if axes is None:
        _, axes = plt.subplots(figsize=(2 + 0.35 * columns, 1 + 0.35 * len(groups)), layout="constrained")
    most = float(picture.nan_to_num().abs().max()) or 1.0
    image = axes.imshow(picture.numpy(), cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    axes.figure.colorbar(image, ax=axes, label="factor on the edit, mean over layers")
    axes.set_yticks(range(len(groups)), [name for name, _ in groups])
    ids = explanation.input_ids
    if tokenizer is not None and ids is not None:
        words = tokenizer.convert_ids_to_tokens(ids[0].tolist())
        axes.set_xticks(range(len(words)), words, rotation=60, ha="right")
    axes.set_xlabel("token")
    return axes
