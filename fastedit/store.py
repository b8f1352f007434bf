"""Edits on disk: `save` and `load` (DESIGN.md 6); how the two files are written and read is in edit_file.py.

edit.json holds: its own checksum; format and version; `edits`, one config an edit (kind, site, layers, rank, tensors);
`strength`; `base`, the model that the edits were made on (id, type, width, depth, a digest of its shape);
`training`, a summary or null; `tensors`, the checksum of edit.safetensors.
"""

import hashlib
import json
import logging
import math
import os
import re
import warnings
from pathlib import Path

import torch

from . import __version__, kept, states
from .arguments import check_flag
from .edit_config import from_config
from .edit_file import JSON, EditFileError, read, write
from .families import find_layers
from .patching import patch
from .planning import find, site_width, width_at
from .root import root_of

__all__ = ["EditFileError", "describe_base", "fetch", "load", "read", "rebuild", "save"]

logger = logging.getLogger("fastedit")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHAPE = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "hidden_act", "encoder_layers", "decoder_layers", "num_decoder_layers",
)  # fmt: skip


def save(handle, folder, *, base_model=None, training=None, tenant=None):
    """Write a handle's edits to a folder; a crash leaves the old edit there or the new. Returns the Path.

    What was trained beside them, a head or an adapter, goes along (fastedit/kept.py). A warning says what was trained and is
    not kept, and that an edit to be trained has never moved.

    Args:
        base_model: id of the base, for edit.json; by default the name the model was loaded under.
        training: a JSON-able summary of how the edits were trained, for edit.json.
        tenant: of a handle with tenants, whose edit to save: an ordinary one.

    Raises:
        OSError: it could not be written (full disk, no permission); an edit saved there before is intact.
        ValueError: `training` is not JSON-able, a tensor holds NaN or infinities, or it is not said which tenant's.
    """
    if tenant is None and handle.tenancy is not None:
        raise ValueError(
            f"this handle holds {handle.tenancy.count} tenants, and a saved edit is one tenant's: save(folder, tenant=0), …"
        )
    tensors = {name: tensor.detach().cpu() for name, tensor in handle.named_tensors(tenant=tenant).items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{name} holds values that are NaN or infinite: not saved; lower the learning rate"
            )
    try:
        json.dumps(training, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"training is not JSON-able ({error}); pass numbers, strings, lists and dicts"
        ) from None
    also, left = kept.beside(handle) if tenant is None else ({}, [])
    _warn(handle, left)
    digest = None
    if also:
        content, digest = kept.payload(also)
        training = {**(training or {}), "head": digest}
        if configs := kept.adapters(handle.model):
            training["adapters"] = configs
    header = {
        "fastedit": __version__, "edits": handle.config(), "strength": handle.strength,
        "base": describe_base(handle.model, base_model), "training": training,
    }  # fmt: skip
    if _writes(handle):
        if also:
            kept.stage(folder, content, digest)
        write(folder, header, tensors)
        kept.settle(folder, digest)
    return Path(folder)


def _warn(handle, left):
    if handle.never_moved():
        warnings.warn(
            "fastedit: this edit is to be trained and has not moved since it was patched: nothing has trained it (were its "
            "parameters in the optimizer, and did they require gradients?)",
            stacklevel=4,
        )
    if left:
        warnings.warn(
            f"fastedit: {len(left)} weights of the model were trained along and are not in this edit ({', '.join(left[:3])}, …); "
            "keep them with model.save_pretrained, or patch with freeze=True",
            stacklevel=4,
        )


def _writes(handle):
    """Whether this process writes: of several that hold parts of the edits, only the first."""
    own = dict(handle._named())
    if all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in own.values()):
        return True
    from . import distributed

    return distributed.writes(own)


def load(model, folder, *, freeze=False, revision=None, head=True):
    """Patch a model with the edits saved in a folder or Hub repo, and bring back what was trained along; returns the Handle.

    Args:
        folder: what `handle.save` wrote, a checkpoint of a Trainer or what `save_pretrained` of a patched model wrote, or a
            Hub repo id such as "anna/my-edit".
        freeze: as for `fastedit.patch`, to train on.
        head: False for the edits alone.
        revision: of the Hub repo.

    Raises:
        EditFileError: the files are not a whole, sound edit, or do not fit this model. Nothing has changed.
    """
    check_flag("head", head), check_flag("freeze", freeze)
    folder = fetch(folder, revision)
    if not os.path.exists(folder / JSON) and (saved := states.find(folder)) is not None:
        return _load_state(model, saved, freeze, head)
    header, edits, tensors, strength = _opened(model, folder)
    handle = patch(model, edits, freeze=freeze)
    try:
        handle.load_tensors(tensors)
        handle.strength = strength
        if head:
            kept.restore(model, folder, header)
    except Exception as error:
        handle.remove()
        raise EditFileError(f"{folder}: {error}") from error
    return handle


def _load_state(model, saved, freeze, head):
    """The edits in a model's own saved state (fastedit/states.py)."""
    if len(saved.handles) != 1:
        raise EditFileError(f"{saved.folder} holds the edits of {len(saved.handles)} handles, expected one: save each by itself")
    record, tensors = saved.handles[0], saved.tensors(saved.handles[0])
    edits = rebuild(saved.folder, record["edits"])
    _check_base(saved.folder, record["base"], describe_base(model))
    _check_tensors(saved.folder, _shapes(saved.folder, edits, _layers(model)), tensors)
    handle = patch(model, edits, freeze=freeze)
    try:
        handle.load_tensors(tensors)
        handle.strength = record["strength"]
        if head and record["trained"]:
            own = dict(model.named_parameters())
            also = saved.others(record["trained"])
            kept.check_head(saved.folder, also, {name: own[name] for name in also if name in own})
            kept.copy_head(also, own)
    except Exception as error:
        handle.remove()
        raise EditFileError(f"{saved.folder}: {error}") from error
    return handle


def opened(model, folder):
    """(edits that change nothing yet, their tensors by name, strength) of a local folder, checked against a model.

    Raises:
        EditFileError: as `load`.
    """
    return _opened(model, folder)[1:]


def _opened(model, folder):
    """(edit.json, and what `opened` gives)."""
    checked = {}

    def limit(header):
        edits = rebuild(folder, header["edits"])
        strength = strength_of(folder, header)
        _check_base(folder, header.get("base"), describe_base(model))
        shapes = _shapes(folder, edits, _layers(model))
        checked.update(edits=edits, strength=strength, shapes=shapes)
        return sum(4 * math.prod(shape) + len(name) + 200 for name, shape in shapes.items()) + 4096

    header, tensors = read(folder, limit)
    _check_tensors(folder, checked["shapes"], tensors)
    return header, checked["edits"], tensors, checked["strength"]


def strength_of(folder, header):
    """The dial that a file was saved at; EditFileError for what is no number that fp32 holds."""
    strength = header.get("strength", 1.0)
    if isinstance(strength, bool) or not isinstance(strength, (int, float)):
        raise EditFileError(f"{folder / JSON}: strength is {strength!r:.60}, expected a number")
    if not abs(strength) <= torch.finfo(torch.float32).max:
        raise EditFileError(f"{folder / JSON}: strength is {strength!r:.20}, beyond what fp32 holds")
    return float(strength)


def _layers(model):
    root = root_of(model)  # which knows the layers even where another library has wrapped some of them since
    return find_layers(model) if root is None else root.layers


def describe_base(model, base_model=None):
    """What edit.json says of a model: id, type, width, depth and a digest of its shape; no weights."""
    layers = _layers(model)
    config = getattr(model, "config", None)
    name = (
        base_model or getattr(config, "name_or_path", None) or getattr(config, "_name_or_path", None) or None
    )
    if name is not None and Path(name).exists():
        name = Path(name).resolve().name  # a local path says nothing to others, and too much of this machine
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    shape = {key: value for key in _SHAPE if isinstance(value := getattr(config, key, None), (int, str))}
    return {
        "model": name, "type": shape.get("model_type", type(model).__name__),
        "width": site_width(layers[0].module, layers[0]), "depth": len(layers),
        "shape": hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16],
    }  # fmt: skip


def fetch(folder, revision=None):
    """The local folder of an edit: itself, or a Hub repo's snapshot."""
    path = Path(folder)
    if os.path.exists(path) or not _REPO.fullmatch(str(folder)):
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(str(folder), revision=revision, allow_patterns=["edit*.safetensors", "head*.safetensors", JSON])
        )
    except Exception as error:  # the hub's errors have no common base besides this
        raise EditFileError(
            f"there is no folder {folder}, and as a Hub repo it could not be fetched: "
            f"{type(error).__name__}: {error}"
        ) from error


def rebuild(folder, configs):
    """The Edit objects of a file's configs, without their tensors; EditFileError names what is wrong."""
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


def _check_base(folder, saved, found):
    where = folder / JSON
    if not isinstance(saved, dict):
        raise EditFileError(f'{where}: "base" is {saved!r:.40}, expected the model that the edit was made on')
    for key in ("width", "depth"):
        if saved.get(key) != found[key]:
            raise EditFileError(
                f"{where}: the edit was made on a base of {key} {saved.get(key)!r:.60} ({saved.get('model')!r:.80}, "
                f"{saved.get('type')!r:.60}), but this model has {key} {found[key]} ({found['model']}, "
                f"{found['type']}); load the base it was made on"
            )
    what = {"type": "a model of type", "shape": "a base of shape", "model": "the base"}
    for key, words in what.items():
        was, now = saved.get(key), found[key]
        comparable = (
            isinstance(was, str) and now is not None and (key != "model" or ("/" in was and "/" in now))
        )
        if comparable and was != now:
            logger.warning(
                "fastedit: %s was made on %s %r, this model is %r; it fits, but may mean something else here",
                where, words, was, now,
            )  # fmt: skip
            return


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
    """Names and shapes against what the configs promise, before anything is built from either."""
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
