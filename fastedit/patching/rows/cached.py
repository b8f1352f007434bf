"""How many tokens a forward finds in its cache, read off the cache object under any argument's name.

A cache that cannot be read must never pass for an empty one: nobody would know which tokens the forward is given.
"""

import torch

_PLAIN = (torch.Tensor, bool, int, float, str, torch.nn.Module)
_CONTAINERS = (list, tuple, dict)  # some models keep their state in these, under names of their own
_STATES = ("state", "states", "mems")


def cache_in(given):
    """(cache, name) among a forward's arguments {name: value}. (None, None) for none.

    A cache is an object that gives its length (an encoder-decoder cache gives that of its self-attention). An argument
    that is named or typed as a cache, but gives none, counts as a cache that cannot be read.
    """
    unread = None, None
    for name, value in given.items():
        if value is None or isinstance(value, _PLAIN):
            continue
        if callable(getattr(value, "get_seq_length", None)):
            return value, name
        if isinstance(value, _CONTAINERS):
            opaque = len(value) and (name in _STATES or "past" in name or "cache" in name)
        else:
            opaque = "Cache" in type(value).__name__ or "cache" in name or "past" in name
        if opaque:
            unread = value, name
    return unread


def length_of(cache):
    """How many tokens are in a cache: an int, a tensor for a static cache, or None if it does not say."""
    if cache is None:
        return 0
    if not callable(getattr(cache, "get_seq_length", None)):
        return None
    try:
        length = cache.get_seq_length()
    except ValueError:  # linear attention keeps a state and no length; an empty one says so
        filled = getattr(cache, "has_previous_state", None)
        filled = filled() if callable(filled) else filled
        return 0 if filled is False else None
    return length.clone() if isinstance(length, torch.Tensor) else length  # a static cache counts in place
