"""Edits read from disk and put on a model: `load`. saving.py writes them."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import torch
from torch import nn

from ..arguments import check_flag
from ..edits.config import from_config
from ..families import find_layers
from ..files.edit_file import JSON, EditFileError, read, write
from ..hints import Folder
from . import control  # noqa: F401, a kind of edit that files may hold
from . import state_dicts as states
from . import trained_beside as kept
from .base_model import check_base, describe_base
from .handle import Handle, patch_as
from .layer_plan import find, width_at
from .model_edits import root_of
from .saving import save

__all__ = ["EditFileError", "describe_base", "fetch", "load", "read", "rebuild", "save", "write"]

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load(
    model: nn.Module, folder: Folder, *, freeze: bool = False, revision: str | None = None, head: bool = True
) -> Handle:
    """Patch a model with the edits saved in a folder or Hub repo, and restore what was trained beside them.

    Args:
        folder: what `handle.save` wrote, a checkpoint of a Trainer, what `save_pretrained` of a patched model wrote, or
            a Hub repo id such as "anna/my-edit".
        freeze: as for `fastedit.patch`, to train further.
        head: False for the edits alone.
        revision: of the Hub repo.

    Returns:
        The Handle.

    Raises:
        EditFileError: the files are not a whole, sound edit, or do not fit this model. Nothing has changed.
        RuntimeError: a forward of the model is under way in another thread.
    """
    check_flag("head", head), check_flag("freeze", freeze)
    folder = fetch(folder, revision)
    if not os.path.exists(folder / JSON) and (saved := states.find(folder)) is not None:
        return _load_state(model, saved, freeze, head)
    header, edits, tensors, strength, also = _opened(model, folder, head)

    def fill(handle):
        try:
            handle.load_tensors(tensors)
            handle.strength = strength
            kept.restore(model, folder, header, also)
        except Exception as error:
            raise EditFileError(f"{folder}: {error}") from error

    return patch_as(Handle, model, edits, freeze, fill=fill)


def _load_state(model, saved, freeze, head):
    """The edits in a model's own saved state (fastedit/patching/state_dicts.py)."""
    if len(saved.handles) != 1:
        raise EditFileError(f"{saved.folder} holds the edits of {len(saved.handles)} handles, expected one: save each by itself")
    record, tensors = saved.handles[0], saved.tensors(saved.handles[0])
    edits = rebuild(saved.folder, record["edits"])
    layers = _layers(model)
    check_base(saved.folder, record.get("base"), describe_base(model, layers=layers))
    _check_tensors(saved.folder, _shapes(saved.folder, edits, layers), tensors)

    def fill(handle):
        try:
            handle.load_tensors(tensors)
            handle.strength = record["strength"]
            if head and record["trained"]:
                own = dict(model.named_parameters())
                also = saved.others(record["trained"])
                kept.check_head(saved.folder, also, {name: own[name] for name in also if name in own})
                kept.copy_head(also, own)
        except Exception as error:
            raise EditFileError(f"{saved.folder}: {error}") from error

    return patch_as(Handle, model, edits, freeze, fill=fill)


def opened(model, folder):
    """(edits that change nothing yet, their tensors by name, strength) of a local folder, checked against a model.

    Raises:
        EditFileError: as `load`.
    """
    return _opened(model, folder)[1:4]


def _opened(model, folder, head=False):
    """(edit.json, what `opened` returns, what trained beside it or {})."""
    checked = {}

    def limit(header):
        edits = rebuild(folder, header["edits"])
        strength = strength_of(folder, header)
        layers = _layers(model)
        check_base(folder, header.get("base"), describe_base(model, layers=layers))
        shapes = _shapes(folder, edits, layers)
        checked.update(edits=edits, strength=strength, shapes=shapes)
        return sum(4 * math.prod(shape) + len(name) + 200 for name, shape in shapes.items()) + 4096

    header, tensors, also = kept.read(folder, model, limit) if head else (*read(folder, limit), {})
    _check_tensors(folder, checked["shapes"], tensors)
    return header, checked["edits"], tensors, checked["strength"], also


def strength_of(folder, header):
    """The strength in a file. EditFileError for anything that is not a number that fp32 holds."""
    strength = header.get("strength", 1.0)
    if isinstance(strength, bool) or not isinstance(strength, (int, float)):
        raise EditFileError(f"{folder / JSON}: strength is {strength!r:.60}, expected a number")
    if not abs(strength) <= torch.finfo(torch.float32).max:
        raise EditFileError(f"{folder / JSON}: strength is {strength!r:.20}, beyond what fp32 holds")
    return float(strength)


def _layers(model):
    root = root_of(model)  # which knows the layers even where another library has wrapped some of them since
    return find_layers(model) if root is None else root.layers


def fetch(folder, revision=None, patterns=("edit*.safetensors", "head*.safetensors", JSON)):
    """The local folder of an edit: itself, or a Hub repo's snapshot of the files of these patterns."""
    path = Path(folder)
    if os.path.exists(path) or not _REPO.fullmatch(str(folder)):
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(folder), revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's errors have no common base besides this
        raise EditFileError(
            f"there is no folder {folder}, and as a Hub repo it could not be fetched: "
            f"{type(error).__name__}: {error}"
        ) from error


def rebuild(folder, configs):
    """The Edit objects of a file's configs, without their tensors. EditFileError names what is wrong."""
    if not configs:
        raise EditFileError(f"{folder} holds no edits: there is nothing to load")
    expected = {"kind": (str, str), "site": (str, str), "layers": (list, int), "tensors": (list, str)}
    for number, config in enumerate(configs):
        for key, (kind, of) in expected.items():
            value = config.get(key)
            if not isinstance(value, kind) or not all(isinstance(item, of) for item in value):
                what = "a string" if kind is str else f"a list of {of.__name__}"
                raise EditFileError(
                    f"{folder / JSON}: {key} of edit {number} is {value!r:.60}, expected {what}"
                )
    try:
        return from_config(configs)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, NotImplementedError) as error:
        raise EditFileError(f"{folder / JSON}: {error}") from None


def _shapes(folder, edits, layers):
    """{name: shape} of the tensors that the configs promise on this model."""
    expected = {}
    for number, edit in enumerate(edits):
        for index in edit.layers or ():
            if not isinstance(index, int) or not 0 <= index < len(layers):
                raise EditFileError(
                    f"{folder / JSON}: layer {index!r}, but this model has layers 0 to {len(layers) - 1}"
                )
            layer = layers[index]
            if layer.at(edit.site) is None:
                raise EditFileError(
                    f"{folder / JSON}: layer {layer.name} of this model has no site {edit.site!r}"
                )
            width = width_at(layer, edit.site)
            for name in edit.names:
                expected[f"{number}.{layer.name}.{edit.site}.{name}"] = edit.shape(name, width)
            for leaf, gate in enumerate(edit.gate.leaves() if edit.gate is not None else ()):
                key = f"{number}.{layer.name}.{edit.site}" if gate.layer is None else f"{number}"
                measured = width if gate.layer is None else width_at(find(gate.layer, layers)[0], gate.site or edit.site)
                expected |= {f"{key}.gate{leaf}.condition": (measured,), f"{key}.gate{leaf}.threshold": (1,)}
    return expected


def _check_tensors(folder, expected, tensors):
    """Check names and shapes against the configs' promise, before anything is built from either."""
    where = folder / "edit.safetensors"
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise EditFileError(
            f"{where} does not hold what {JSON} describes on this model: missing "
            f"{', '.join(missing[:3]) or 'nothing'}; not described {', '.join(extra[:3]) or 'nothing'}"
        )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise EditFileError(
                f"{where}: {name} has shape {tuple(tensors[name].shape)}, this model needs {shape}"
            )
