"""A forward that stops after the deepest place whose hidden states are wanted: no later layer, no LM head."""

from ..families import find_layers
from ..patching.site_kinds import watch


class _Reached(Exception):
    """The deepest wanted place has been passed. Never leaves this file."""


def forward_until(model, places, inputs):
    """Call model(**inputs) as far as the last of some places.

    Args:
        places: [(layer, site, take)] in the order in which they are passed; take(hidden) sees each one's hidden states.
    """

    def reached(hidden, take):
        take(hidden)
        raise _Reached

    hooks, last = [], len(places) - 1
    try:
        for number, (layer, site, take) in enumerate(places):
            ends = number == last
            hooks.append(watch(layer, site, (lambda hidden, take=take: reached(hidden, take)) if ends else take))
        model(**inputs)
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()


def residual_stream(model, after, inputs, last=None, layers=None):
    """The residual stream after some blocks, [(batch, tokens, width)], in the order of `after`. Differentiable.

    Args:
        model: an nn.Module with one stack of layers, called as model(**inputs).
        after: after how many blocks, numbers from 1 on. Edits and adapters on those blocks count.
        last: keep only that many columns at the end.
        layers: find_layers(model), if the caller calls this often.

    Raises:
        ValueError: a number of blocks that the model does not have.
    """
    layers = find_layers(model) if layers is None else layers
    check_depths(after, len(layers))
    found = {}

    def keeper(depth):
        def keep(hidden):
            found[depth] = hidden if last is None else hidden[:, -last:]

        return keep

    places = [(layers[depth - 1], "block", keeper(depth)) for depth in sorted(set(after))]
    forward_until(model, places, {**inputs, "use_cache": False})
    return [found[depth] for depth in after]


def check_depths(after, layers):
    if not after or any(isinstance(d, bool) or not isinstance(d, int) or not 1 <= d <= layers for d in after):
        raise ValueError(f"layers is {list(after)!r}, expected numbers of blocks from 1 to {layers}, at least one")
