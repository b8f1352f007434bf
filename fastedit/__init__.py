"""fastedit: representation editing inside transformer layers at the cost of the residual add.

    handle = fastedit.patch(model, fastedit.RED(), freeze=True)

Names load on first use, so that `fastedit.arrays` (NumPy, CuPy), `fastedit.jax` and `fastedit.kernels` import
no torch.
"""

import importlib

from . import forked

__version__ = "0.1.0"

_HOME = {
    "bank": ("Bank", "BankFullError"),
    "calibration": ("Dose", "calibrate"),
    "capturing": ("Captured", "capture"),
    "contrasting": ("contrast",),
    "directions": ("Directions", "DirectionsFileError"),
    "form": ("Form", "fold", "merge"),
    "edits": ("Ablate", "Amplify", "Clamp", "Edit", "LowRank", "RED", "Rotate", "ScaleBias", "Steer"),
    "gates": ("Gate",),
    "moments": ("Moments",),
    "probes": ("Probe",),
    "patch": ("Handle", "patch"),
    "red_plus": ("REDPlus",),
    "reft": ("DiReFT", "LoReFT", "NoReFT"),
    "stacks": ("Stack",),
    "store": ("load", "EditFileError"),
    "interop.adopt": ("adopt",),
    "interop.red": ("load_red_checkpoint",),
    "interop.smollm2": ("chat_model",),
    "sweeping": ("Sweep", "sweep"),
    "value_net": ("ValueNet",),
    "verifying": ("verify",),
}  # fmt: skip
_WHERE = {name: module for module, names in _HOME.items() for name in names}
_MODULES = ("arrays", "dispatch", "distributed", "families", "interop", "methods", "ops", "recipes", "store")
_UNLISTED = ("jax",)  # not in __all__: a star import would hide the user's own jax, and fail where there is none

__all__ = sorted([*_WHERE, *_MODULES, "__version__"])


forked.watch()


def __getattr__(name):
    if name in _WHERE:
        value = getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    elif name in _MODULES or name in _UNLISTED:
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module 'fastedit' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return __all__
