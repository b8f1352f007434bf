"""The registry of variants: what is timed, under which kinds of edit and which works, and how it is built.

    @variant("hook", kinds=KINDS, works=WORKS)
    def hook(model, values):
        ...                        # put values (edits.Values) on `model`, which is this variant's own
        return model               # or (model, "a note for its rows")

A builder returns what the works drive: `model(input_ids=…)` with `.logits`, `generate`, `parameters`, `train`.
Its parameters are frozen; in training (`values.trainable`) it adds those that train.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

KINDS = ("red", "steer", "ablate", "lowrank4")
TRAINED_KINDS = ("red", "lowrank4")
INFERENCE = ("decode", "decode 16", "decode 64", "prefill 256", "generate 32")
TRAINING = ("training step",)
WORKS = INFERENCE + TRAINING
FAMILIES = ("llama", "bert")
MODULES = ("plain", "wrapper", "ours", "peft", "pyreft", "pyvene", "repeng", "steering_vectors")

_variants = {}


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    needs: packages to import, without which it is skipped. same_edit: its output must equal the plain hook's
    before it is timed; False for what does something else (no edit, or another one: `note` says which).
    own_weights: it changes weights, so it cannot share them with the others. compiled: its operations cannot be
    counted, and its start is slow. families: of models that it serves.
    """

    name: str
    build: Callable
    kinds: tuple
    works: tuple
    needs: tuple = ()
    same_edit: bool = True
    own_weights: bool = False
    compiled: bool = False
    families: tuple = FAMILIES
    note: str = ""

    def serves(self, family, kind, work):
        if work in TRAINING and kind not in TRAINED_KINDS:
            return False
        return family in self.families and kind in self.kinds and work in self.works

    def missing(self):
        """Why it cannot be built here, or None."""
        for package in self.needs:
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed (make peers)"
        return None


def variant(name, *, kinds, works, **options):
    """Register the decorated builder; returns it unchanged."""
    for given, known in ((kinds, KINDS), (works, WORKS)):
        unknown = set(given) - set(known)
        if unknown:
            raise ValueError(f"variant {name!r}: unknown {sorted(unknown)}, expected some of {', '.join(known)}")

    def register(build):
        if name in _variants:
            raise ValueError(f"there are two variants named {name!r}")
        _variants[name] = Variant(name, build, tuple(kinds), tuple(works), **options)
        return build

    return register


def variants():
    """{name: Variant}, in the order of the table."""
    for module in MODULES:
        importlib.import_module(f".variants.{module}", __package__)
    return dict(_variants)


def serving(family, kind, work, names=None):
    """[Variant] for one cell of the table; names, if given, choose among them (the base always stays)."""
    chosen = [v for v in variants().values() if v.serves(family, kind, work)]
    return [v for v in chosen if not names or v.name in names or v.name == base_of(work)]


def base_of(work):
    """The variant that ratios are to: for training the floor, as the unedited model has nothing to train."""
    return "floor" if work in TRAINING else "unedited"
