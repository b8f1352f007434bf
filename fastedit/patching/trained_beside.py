"""What was trained beside an edit and is kept with it: head.safetensors beside edit.json.

    folder/head.safetensors   parameters by their names on the model: a task head, an adapter; in their own dtypes
    folder/edit.json          in `training`: "head", the sha256 of that file, and "adapters", PEFT's configs

It is written and read in one with the edit (files/edit_file.py): a crash leaves the old pair or the new one.
"""

import contextlib
import hashlib
import sys
from pathlib import Path

import torch
from safetensors.torch import save as to_bytes

from ..files import edit_file
from ..files.edit_file import HEAD, EditFileError, named, promised, staged_name
from ..files.sealed import plain_tensors, read_regular
from ..ops.parameter_changes import has_stepped
from .heads import heads


def beside(handle):
    """({name: parameter} that trains or was trained beside the edits and is kept, names of those that are not kept).

    With freeze=True everything that trains is kept: heads and adapters, and what an optimizer has moved. Without it,
    heads and adapters that an optimizer has moved since the patch are kept. Base weights that it has moved are not:
    they are a model of their own.
    """
    edits = {id(p) for p in handle._root.parameters()}
    new = {id(p) for module in heads(handle.model) for p in module.parameters()} | {
        id(p) for p in adapter_parameters(handle.model)
    }
    kept, left = {}, []
    for name, parameter in handle.model.named_parameters():
        if id(parameter) in edits:
            continue
        moved = has_stepped(parameter, handle.since)
        trained = moved or id(parameter) in new  # a sharded weight may have its gradient on though nothing trains it
        if (handle.freeze and parameter.requires_grad and trained) or (moved and id(parameter) in new):
            kept[name] = parameter
        elif moved:
            left.append(name)
    return kept, left


def adapter_parameters(model):
    """The parameters that PEFT has put into a model."""
    if "peft" not in sys.modules:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            base = {id(p) for p in module.get_base_layer().parameters()}
            yield from (p for p in module.parameters() if id(p) not in base)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            yield from module.modules_to_save.parameters() if hasattr(module, "modules_to_save") else ()


def payload(tensors):
    """(the file's bytes, their sha256) of {name: tensor}. ValueError for values that are not finite.

    Tensors laid out over several processes are gathered: all of these processes must call this.
    """
    if any(type(tensor) not in (torch.Tensor, torch.nn.Parameter) for tensor in tensors.values()):
        from . import distributed

        tensors = distributed.gathered(tensors)
    held = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    for name, tensor in held.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name} holds values that are NaN or infinite: not saved; lower the learning rate")
    content = to_bytes({name: tensor.clone() for name, tensor in held.items()})
    return content, hashlib.sha256(content).hexdigest()


def read(folder, model, limit=None, must=False):
    """(edit.json, the edit's tensors by name, the head's) of one save, whatever writers do meanwhile.

    model: what the head is to be of: it says how large the head may be. limit: of `edit_file.read`. must: whether a folder
        without a head is refused, by EditFileError. Else the head is {}.
    """
    folder = Path(folder)
    most = (1 << 20) + 8 * sum(p.numel() for p in model.parameters())  # two 4-bit weights lie in one element: 4 bytes of each
    while True:
        header, tensors = edit_file.read(folder, limit)
        if not must and named(header)[1] is None:
            return header, tensors, {}
        try:
            return header, tensors, read_head(folder, header, most)
        except EditFileError:
            with contextlib.suppress(OSError):  # said by the next look
                if promised(folder) == named(header):
                    raise


def read_head(folder, header, most):
    """{name: tensor} of a folder's head, checked against edit.json. EditFileError if it is missing or of another
    edit, or of more than `most` bytes."""
    folder, digest = Path(folder), named(header)[1]
    found = f"{folder} has no {HEAD}: expected a folder that handle.save wrote after training with a head"
    for path in (folder / HEAD, folder / staged_name(HEAD, digest), folder / HEAD):  # the last: renamed between the looks
        try:
            content = read_regular(path, most)
            if hashlib.sha256(content).hexdigest() == digest:
                return plain_tensors(content)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise EditFileError(f"{path} cannot be read: {error.strerror or error}") from None
        except ValueError as error:  # Damaged, and names that no file has
            raise EditFileError(f"{path} {error}") from None
        found = f"{path} is not the head of this edit: its checksum differs from the one in edit.json"
    raise EditFileError(found)


def check_head(folder, head, own):
    """Check a head's tensors against `own`, {name: parameter}, by name and shape."""
    if head.keys() != own.keys():
        missing, extra = sorted(own.keys() - head.keys()), sorted(head.keys() - own.keys())
        raise EditFileError(
            f"{folder}/{HEAD}: missing {missing[:3]}, not in this model {extra[:3]}; load it onto the model with the head that "
            "was trained, or the edit alone with fastedit.load(model, folder, head=False)"
        )
    for name, tensor in sorted(head.items()):
        if tensor.shape != own[name].shape:
            raise EditFileError(
                f"{folder}/{HEAD}: {name} has shape {tuple(tensor.shape)}, this model's is {tuple(own[name].shape)}"
            )


def copy_head(head, own):
    with torch.no_grad():
        for name, tensor in head.items():
            own[name].copy_(tensor)


def adapters(model):
    """{name: PEFT config as a dict} of the adapters in a model, JSON-able. {} for none."""
    configs = getattr(model, "peft_config", None) if "peft" in sys.modules else None
    if not isinstance(configs, dict):
        return {}
    return {name: _plain(config.to_dict()) for name, config in configs.items()}


def _plain(value):
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset, list, tuple)):
        return [_plain(v) for v in (sorted(value, key=str) if isinstance(value, (set, frozenset)) else value)]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def restore(model, folder, header, head):
    """Bring back onto a model what was trained beside a folder's edit, as `read` gives it. Does nothing if there was nothing.

    PEFT injects adapters that the model does not have, in place.

    Raises:
        EditFileError: damaged, or not of this model. Nothing has changed except for injected adapters.
    """
    if not head:
        return
    note = header["training"]
    own = {name: p for name, p in model.named_parameters() if name in head}
    if head.keys() != own.keys() and note.get("adapters"):
        _inject(model, note["adapters"], folder)
        own = {name: p for name, p in model.named_parameters() if name in head}
    check_head(folder, head, own)
    copy_head(head, own)


def _inject(model, configs, folder):
    try:
        from peft import PeftConfig, inject_adapter_in_model
    except ImportError:
        raise EditFileError(f"{folder} holds a PEFT adapter beside the edit: pip install peft") from None
    for name, config in configs.items():
        if name not in (getattr(model, "peft_config", None) or {}):
            made = PeftConfig.from_peft_type(**config)
            inject_adapter_in_model(made, model, adapter_name=name)
            model.peft_config = {**(getattr(model, "peft_config", None) or {}), name: made}
