"""A forward that stops behind the deepest layer whose hidden states are wanted: no later layer, no LM head."""

import torch

from .families import find_layers


class _Reached(Exception):
    """The deepest wanted layer has run. Never leaves this file."""


def residual_stream(model, after, inputs, last=None):
    """The residual stream after so many blocks, [(batch, tokens, width)], in the order of `after`; differentiable.

    Args:
        model: an nn.Module with one stack of layers, called as model(**inputs).
        after: numbers of blocks, from 1 on. Edits and adapters on those blocks count.
        last: keep only that many columns at the end.

    Raises:
        ValueError: a number of blocks that the model does not have.
    """
    layers = find_layers(model)
    check_depths(after, len(layers))
    found, deepest = {}, max(after)

    def note(depth):
        def hook(module, args, output):
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            found[depth] = hidden if last is None else hidden[:, -last:]
            if depth == deepest:
                raise _Reached

        return hook

    hooks = [layers[depth - 1].module.register_forward_hook(note(depth)) for depth in set(after)]
    try:
        model(**inputs, use_cache=False)
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return [found[depth] for depth in after]


def check_depths(after, layers):
    if not after or any(isinstance(d, bool) or not isinstance(d, int) or not 1 <= d <= layers for d in after):
        raise ValueError(f"layers is {list(after)!r}, expected numbers of blocks from 1 to {layers}, at least one")
