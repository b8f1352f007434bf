"""Published methods that are more than one edit, one file each."""

import importlib

__all__ = ["cast", "inferaligner", "rahf", "rahf_student", "rahf_teachers", "recontrol", "recontrol_report", "roleref", "ubpl"]


def __getattr__(name):
    if name not in __all__:
        raise AttributeError(f"module 'fastedit.methods' has no attribute {name!r}; it has {', '.join(__all__)}")
    return importlib.import_module(f".{name}", __name__)
