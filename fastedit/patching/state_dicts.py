"""Edits in a model's own state dict: what a Trainer's checkpoint or `save_pretrained` of a patched model holds.

The masters' tensors are `fastedit.<handle>.<name>`. One more entry, `fastedit._extra_state`, is bytes of JSON: each
handle's edits, strength and base, and the names of the parameters that were trained beside them.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..files.edit_file import EditFileError
from .base_model import describe_base
from .trained_beside import beside

KEY = "_extra_state"
_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"


def note(root):
    """What is saved about a model's handles, as a uint8 tensor. None without handles, or with tenants."""
    active = [  # a Bank has no tenancy
        h for h in root.handles.values() if h.name in root._modules and getattr(h, "tenancy", "bank") is None
    ]
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
    try:
        if (folder / _INDEX).is_file():
            files = sorted({folder / name for name in json.loads((folder / _INDEX).read_text())["weight_map"].values()})
        else:
            files = [path for path in (folder / _WHOLE,) if path.is_file()]
        where = {}
        for path in files:
            with safe_open(path, "pt") as file:
                where |= dict.fromkeys(file.keys(), path)
        key = next((key for key in where if key == f"fastedit.{KEY}" or key.endswith(f".fastedit.{KEY}")), None)
        if key is None:
            return None
        with safe_open(where[key], "pt") as file:
            read = json.loads(bytes(file.get_tensor(key).tolist()))
        return Saved(folder, key.removesuffix(KEY), read["handles"], where)
    except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
        raise EditFileError(f"{folder}: the edits in its weights could not be read: {error}") from error
