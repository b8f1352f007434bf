"""The Triton backend, for NVIDIA and AMD GPUs: the ops of the reference under the same names."""

from .edit import edit, edit_backward
from .edit_add import edit_add, edit_add_backward
from .edit_add_norm import edit_add_norm, edit_add_norm_backward
from .moments import moments
from .project import project, project_backward
from .value_ascent import value_ascent

__all__ = [
    "edit", "edit_add", "edit_add_backward", "edit_add_norm", "edit_add_norm_backward", "edit_backward",
    "moments", "project", "project_backward", "value_ascent",
]  # fmt: skip
