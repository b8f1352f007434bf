"""The kernels as functions: on torch tensors here, on other arrays in `arrays`, on JAX's in `jax`.

    fastedit.ops.edit(hidden, scale, bias)

Imports the kernels and `arguments`, nothing else of fastedit. Read `public.py` first, then `native.py` and `autograd.py`.
Names load on first use: `arrays` and `jax` import no torch.
"""

import importlib

__all__ = ["edit", "edit_add", "edit_add_norm", "moments", "project", "value_ascent"]


def __getattr__(name):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(".public", __name__), name)
    return value
