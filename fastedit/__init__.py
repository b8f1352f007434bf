"""fastedit: representation editing inside transformer layers at the cost of the residual add.

    handle = fastedit.patch(model, fastedit.RED(), freeze=True)

Names load on first use. So `fastedit.arrays` (NumPy, CuPy), `fastedit.jax` and `fastedit.kernels` import no torch.
"""

import importlib
import importlib.abc
import importlib.util
import sys

from . import forked

if importlib.util.find_spec(".kernels", __name__) is None:  # the build puts it there, from the checkout's folder kernels/
    raise ImportError(
        f"{__path__[0]} is the checkout's folder of sources, not the installed package, which it hides: start Python in "
        "another folder, or install the checkout with pip install -e ."
    )

__version__ = "0.1.0"

_HOME = {
    "banks.bank": ("Bank", "BankFullError"),
    "directions.dose": ("Dose", "calibrate"),
    "capturing.capture": ("Captured", "capture"),
    "directions.contrast": ("contrast",),
    "directions.directions": ("Directions", "DirectionsFileError"),
    "edits.form": ("Form", "fold", "merge"),
    "edits.kinds": ("Ablate", "Amplify", "Clamp", "Edit", "LowRank", "RED", "Rotate", "ScaleBias", "Steer"),
    "edits.gates": ("Gate",),
    "capturing.moments": ("Moments",),
    "edits.probes": ("Probe",),
    "patching.handle": ("Handle", "patch"),
    "edits.red_plus": ("REDPlus",),
    "edits.reft": ("DiReFT", "LoReFT", "NoReFT"),
    "edits.stack": ("Stack",),
    "patching.edit_folder": ("load", "EditFileError"),
    "interop.adopt": ("adopt",),
    "interop.folders": ("load_adapter",),
    "interop.peft_folder": ("save_peft",),
    "interop.pyreft_folder": ("save_pyreft",),
    "interop.red": ("load_red_checkpoint",),
    "interop.smollm2": ("chat_model",),
    "directions.sweep": ("Sweep", "sweep"),
    "ops.value_net": ("ValueNet",),
    "verifying": ("verify",),
}  # fmt: skip
_WHERE = {name: module for module, names in _HOME.items() for name in names}
_MODULES = ("families", "interop", "methods", "ops")
_ALIASES = {  # public modules by their short names, `import fastedit.arrays` among them
    "arrays": "ops.arrays", "dispatch": "ops.dispatch", "distributed": "patching.distributed", "jax": "ops.jax",
    "recipes": "training.recipes", "store": "patching.edit_folder",
}  # fmt: skip

# Without jax: a star import would hide the user's own, and fail where there is none.
__all__ = sorted([*_WHERE, *_MODULES, *(_ALIASES.keys() - {"jax"}), "__version__"])


class _Aliases(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets `import fastedit.arrays` find fastedit.ops.arrays: one module under both names."""

    def find_spec(self, name, path=None, target=None):
        package, _, short = name.rpartition(".")
        return importlib.util.spec_from_loader(name, self) if package == __name__ and short in _ALIASES else None

    def create_module(self, spec):
        module = importlib.import_module(f"{__name__}.{_ALIASES[spec.name.rpartition('.')[2]]}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module):
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.append(_Aliases())
forked.watch()


def __getattr__(name):
    if name in _WHERE:
        value = getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    elif name in _MODULES or name in _ALIASES:
        value = importlib.import_module(f".{_ALIASES.get(name, name)}", __name__)
    else:
        raise AttributeError(f"module 'fastedit' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return __all__
