"""A module's own class, below the subclass that a patched module is given (patching/class_swap.py)."""

BASE = "_fastedit_base"


def base_of(module):
    """The module's own class, whether or not it is swapped."""
    return type(module).__dict__.get(BASE, type(module))
