"""Edits rebuilt from the descriptions that files hold (`Edit.config`)."""

from . import probes, reft  # noqa: F401, whose kinds are edits too
from .gates import rule_of
from .kinds import Edit


def from_config(configs):
    """Edits rebuilt from configs (`Edit.config`, `Handle.config`). They change nothing until tensors are loaded.

    Raises:
        ValueError: an unknown kind, site, tensor or key, by name.
    """
    return [_rebuild(config) for config in configs]


def _rebuild(config):
    kinds = {kind.__name__: kind for kind in _kinds(Edit)}
    kind = kinds.get(config.get("kind"))
    if kind is None:
        raise ValueError(
            f"unknown kind of edit {config.get('kind')!r}; the kinds are {', '.join(sorted(kinds))}"
        )
    where = ("site", "layers", "positions", "strength", "keep_norm")
    known = {"kind", "rank", "tensors", "trainable", "gate", *where, *kind.options}
    unknown = sorted(set(config) - known)
    if unknown:
        raise ValueError(
            f"{kind.__name__}: unknown key {unknown[0]!r} in its config; known are {sorted(known)}"
        )
    names, rank = config.get("tensors"), config.get("rank", 0)
    if not names or not set(names) <= set(kind.allowed_names):
        raise ValueError(
            f"{kind.__name__}: tensors is {names!r}, expected some of {', '.join(kind.allowed_names)}"
        )
    if (
        isinstance(rank, bool)
        or not isinstance(rank, int)
        or rank < 0
        or (rank == 0) != {"read", "write", "plane"}.isdisjoint(names)
    ):
        raise ValueError(f"{kind.__name__}: rank is {rank!r} with tensors {names}")
    edit = object.__new__(kind)
    for name in kind.options:
        setattr(edit, name, config.get(name))
    Edit.__init__(edit, names, rank, **{key: config[key] for key in where if key in config})
    edit.trainable, edit.neutral = bool(config.get("trainable", kind.trainable)), True
    edit.gate = rule_of(config["gate"]) if config.get("gate") is not None else None
    edit.check()
    return edit


def _kinds(cls):
    for kind in cls.__subclasses__():
        yield kind
        yield from _kinds(kind)
