"""The public names of fastedit/patching/handle.py, for `fastedit.patch`."""

from .patching.handle import Handle, patch

__all__ = ["Handle", "patch"]
