"""Edits where a model is saved: in a Trainer's checkpoint in the model's own state dict, by `save_pretrained` beside it.

`model.save_pretrained(folder)` of a patched model writes the model without its edits, which loads everywhere, and what
`handle.save(folder)` would write beside it, for `fastedit.load(model, folder)`. A call that gives a state_dict, as those of a
Trainer do, whose checkpoints are loaded into the patched model again, saves that: beside the masters' tensors,
`fastedit.<handle>.<name>`, there is one more, `fastedit._extra_state`: bytes of JSON with each handle's edits, strength and
base, and the names of the parameters that were trained along.
"""

import inspect
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..files.edit_file import JSON, EditFileError
from ..files.sealed import open_regular, parse_json, read_regular
from .base_model import describe_base
from .eval_mode import check_data
from .trained_beside import beside

KEY, SAVE = "_extra_state", "save_pretrained"
_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"


class Saving:
    """In the place of a patched model's `save_pretrained`.

    Raises:
        ValueError: several handles, or tenants, whose edits are no one edit; nothing is written.
    """

    def __init__(self, model):
        self.model = model

    def __call__(self, save_directory, *args, **kwargs):
        own = getattr(type(self.model), SAVE)
        if "state_dict" in kwargs:
            return own(self.model, save_directory, *args, **kwargs)
        check_data(self.model, "to save the model")
        active = _active(self.model._modules["fastedit"])
        if len(active) > 1 or any(handle.tenancy is not None for handle in active):
            raise ValueError(
                f"{type(self.model).__name__}.save_pretrained would write one edit beside the model, which holds "
                f"{len(active)} handles{'' if len(active) > 1 else ' of several tenants'}: save each with handle.save(folder), "
                "and the model after handle.remove(); or merge them"
            )
        if not active and (Path(save_directory) / JSON).exists():
            raise ValueError(
                f"{save_directory} holds an edit beside a model, and this model's edits are in its weights (merged) or in a "
                f"bank: fastedit.load would put that edit on top; choose another folder, or delete {JSON} there"
            )
        if "state_dict" in inspect.signature(own).parameters:
            kept = {key: value for key, value in self.model.state_dict().items() if not key.startswith("fastedit.")}
            kwargs["state_dict"] = kept
        done = own(self.model, save_directory, *args, **kwargs)
        if active and kwargs.get("is_main_process", True):
            active[0].save(save_directory)
        return done


def _active(root):
    """The handles whose edits run. A Bank has no tenancy."""
    return [h for h in root.handles.values() if hasattr(h, "tenancy") and h.name in root._modules]


def note(root):
    """What is saved of a model's handles as a uint8 tensor, or None: no handles, or those of several tenants."""
    active = [h for h in _active(root) if h.tenancy is None]
    if not active:
        return None
    found = [
        {"name": h.name, "edits": h.config(), "strength": h.strength, "base": describe_base(h.model, layers=root.layers),
         "trained": list(beside(h)[0])}
        for h in active
    ]  # fmt: skip
    return torch.frombuffer(bytearray(json.dumps({"fastedit": 1, "handles": found}).encode()), dtype=torch.uint8)


@dataclass
class Saved:
    """A folder's saved state. handles: [{"name", "edits", "strength", "base", "trained"}]. where: {key: file}."""

    folder: Path
    prefix: str
    handles: list
    where: dict = field(repr=False)

    def tensors(self, record):
        """{name as in handle.named_tensors: tensor} of one handle."""
        start = f"{self.prefix}{record['name']}."
        return {key.removeprefix(start): self._get(key) for key in self.where if key.startswith(start)}

    def others(self, names):
        """{name: tensor} of parameters outside the edits, as far as the file has them."""
        before = self.prefix.removesuffix("fastedit.")
        return {name: self._get(before + name) for name in names if before + name in self.where}

    def _get(self, key):
        with safe_open(self.where[key], "pt") as file:
            return file.get_tensor(key)


def find(folder):
    """The Saved of a folder, or None if its weights hold no edits."""
    folder = Path(folder)
    if not os.path.isdir(folder):  # Path.is_file raises for a name that is too long
        return None
    try:
        if (folder / _INDEX).is_file():
            index = parse_json(read_regular(folder / _INDEX, 1 << 30))
            files = sorted({folder / name for name in index["weight_map"].values()})
        else:
            files = [path for path in (folder / _WHOLE,) if path.is_file()]
        where = {}
        for path in files:
            open_regular(path, None).close()
            with safe_open(path, "pt") as file:
                where |= dict.fromkeys(file.keys(), path)
        key = next((key for key in where if key == f"fastedit.{KEY}" or key.endswith(f".fastedit.{KEY}")), None)
        if key is None:
            return None
        with safe_open(where[key], "pt") as file:
            read = parse_json(bytes(file.get_tensor(key).tolist()))
        return Saved(folder, key.removesuffix(KEY), _checked(read["handles"]), where)
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise EditFileError(f"{folder}: the edits in its weights could not be read: {error}") from error


def _checked(handles):
    kinds = {"name": str, "edits": list, "strength": (int, float), "trained": list}
    for handle in handles if isinstance(handles, list) else [handles]:
        for key, kind in kinds.items():
            if not isinstance(handle, dict) or not isinstance(handle.get(key), kind):
                raise ValueError(f"it holds {handle!r:.80} as a handle, expected {', '.join(kinds)} and base")
        if not all(isinstance(edit, dict) for edit in handle["edits"]) or not all(isinstance(n, str) for n in handle["trained"]):
            raise ValueError(f"the edits or trained names of its handle {handle['name']!r:.40} are none")
    return handles
