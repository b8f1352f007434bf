"""The public names of fastedit/patching.py, for `fastedit.patch`."""

from .patching import Handle, patch

__all__ = ["Handle", "patch"]
