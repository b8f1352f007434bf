"""Edits written to disk (docs/design.md, 9). files/edit_file.py writes and reads the two files themselves.

edit.json holds: its own checksum; format and version; `edits`, one config per edit (kind, site, layers, rank, tensors);
`strength`; `base`, the model that the edits were made on (base_model.py); `training`, a summary or null; `tensors`, the
checksum of edit.safetensors.
"""

import json
import warnings
from pathlib import Path

import torch

from .. import __version__
from ..files.edit_file import write
from . import trained_beside as kept
from .base_model import describe_base
from .eval_mode import check_data
from .model_edits import root_of


def save(handle, folder, *, base_model=None, training=None, tenant=None):
    """Write a handle's edits to a folder. A crash leaves the old edit there or the new one. Returns the Path.

    What was trained beside them, a head or an adapter, is saved too (trained_beside.py). A warning says what was trained and
    is not kept, and whether an edit that should train has never moved.

    Args:
        base_model: id of the base, for edit.json. By default the name under which the model was loaded.
        training: a JSON-able dict, a summary of how the edits were trained, for edit.json.
        tenant: of a handle with tenants, the one whose edit to save. It becomes an ordinary edit.

    Raises:
        OSError: the folder could not be written (full disk, no permission). An edit saved there before is intact.
        ValueError: `training` is not such a dict, or has the key "head" or "adapters"; a tensor holds NaN or infinities; `tenant`
            is missing.
    """
    if tenant is None and handle.tenancy is not None:
        raise ValueError(
            f"this handle holds {handle.tenancy.count} tenants, and a saved edit is one tenant's: save(folder, tenant=0), …"
        )
    check_data(handle._tree, "to save an edit")
    tensors = {name: tensor.detach().cpu() for name, tensor in handle.named_tensors(tenant=tenant).items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{name} holds values that are NaN or infinite: not saved; lower the learning rate"
            )
    if not isinstance(training, dict | None) or {"head", "adapters"} & (training or {}).keys():
        raise ValueError(
            f'training is {training!r:.80}, expected a dict without "head" and "adapters", which here name what was trained '
            "beside the edit"
        )
    try:
        json.dumps(training, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"training is not JSON-able ({error}); pass numbers, strings, lists and dicts"
        ) from None
    also, left = kept.beside(handle) if tenant is None else ({}, [])
    _warn(handle, left)
    content = None
    if also:
        content, digest = kept.payload(also)
        training = {**(training or {}), "head": digest}
        if configs := kept.adapters(handle.model):
            training["adapters"] = configs
    header = {
        "fastedit": __version__, "edits": handle.config(), "strength": handle.strength,
        "base": describe_base(handle.model, base_model, root_of(handle.model).layers), "training": training,
    }  # fmt: skip
    if _writes(handle):
        write(folder, header, tensors, head=content)
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
            f"fastedit: {len(left)} weights of the model were trained too and are not in this edit ({', '.join(left[:3])}, …); "
            "keep them with model.save_pretrained, or patch with freeze=True",
            stacklevel=4,
        )


def _writes(handle):
    """Whether this process writes. Of several that hold parts of the edits, only the first does."""
    own = dict(handle._named())
    if all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in own.values()):
        return True
    from . import distributed  # which takes a while to import

    return distributed.writes(own)
