"""The files of RED's authors (arXiv 2402.15179): `delta_vector.pth`, a state dict of scales and biases.

    model.layers.0.mlp.down_proj.delta_vector.activation_scaling   (1, width)
    model.layers.0.mlp.down_proj.delta_vector.activation_bias      (1, width)

Each key begins with the path of the linear map whose output it edits.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
from torch import nn

from ..edits.kinds import RED, ScaleBias
from ..families import find_layers
from ..files.archive import read_archive
from ..files.edit_file import EditFileError
from ..files.sealed import Damaged
from ..patching.handle import Handle, patch

__all__ = ["load_red_checkpoint"]

logger = logging.getLogger("fastedit")
FILE = "delta_vector.pth"
_PARTS = {"activation_scaling": ("scale", 1.0), "activation_bias": ("bias", 0.0)}


def load_red_checkpoint(model: nn.Module, path: str | os.PathLike[str], *, freeze: bool = False) -> Handle:
    """Patch a model with a RED checkpoint of its authors' code. Returns the Handle.

    Args:
        path: delta_vector.pth, or the folder that holds it. Read with weights_only=True: no code in it runs.
        freeze: as for `fastedit.patch`.

    Raises:
        EditFileError: not such a file, or one that does not fit this model. Nothing has changed.
    """
    path = Path(path)
    path = path / FILE if os.path.isdir(path) else path
    found = _grouped(path, read_state(path, f"{FILE} as RED's training code saves it"))
    sites = _sites(model)
    edits = {}
    for module, parts in found.items():
        layer, site = _place(path, module, sites)
        width = next(iter(parts.values())).numel()
        for name, neutral in _PARTS.values():
            edits.setdefault(site, {}).setdefault(name, {})[layer] = parts.get(
                name, torch.full((width,), neutral)
            )
    if all((scale == 1).all() for parts in edits.values() for scale in parts["scale"].values()):
        logger.warning(
            "fastedit: every scale in %s is exactly 1: trained in bf16, where a scale cannot leave it", path
        )
    try:
        return patch(model, [_edit(site, parts) for site, parts in edits.items()], freeze=freeze)
    except ValueError as error:
        raise EditFileError(f"{path}: {error}") from error


def _edit(site, parts):
    kind = RED if site == "mlp" else ScaleBias
    return kind(parts["scale"], parts["bias"], site=site)


def read_state(path, expected):
    """The tensors of a file of torch.save, without executing anything in it.

    Raises:
        EditFileError: it is none; `expected` says what it should be.
    """
    try:
        return read_archive(path)
    except FileNotFoundError:
        raise EditFileError(f"there is no {path}; expected {expected}") from None
    except Damaged as error:
        raise EditFileError(f"{path} {error}; expected {expected}") from None


def _grouped(path, state):
    """{module path: {"scale" and "bias": (width,)}}"""
    found, ignored = {}, []
    for key, tensor in state.items():
        module, _, part = str(key).rpartition(".delta_vector.")
        if not module or part not in _PARTS:
            ignored.append(str(key))
            continue
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise EditFileError(
                f"{path}: {key} is a {getattr(tensor, 'dtype', type(tensor).__name__)}, expected floats"
            )
        if tensor.dim() not in (1, 2) or tensor.numel() != tensor.shape[-1] or tensor.layout != torch.strided:
            raise EditFileError(f"{path}: {key!s:.80} has shape {tuple(tensor.shape)!s:.80}, expected (1, width)")
        if not tensor.isfinite().all():
            raise EditFileError(f"{path}: {key} holds values that are NaN or infinite")
        found.setdefault(module, {})[_PARTS[part][0]] = tensor.reshape(-1).float()
    if not found:
        some = ", ".join(ignored[:3]) or "nothing"
        raise EditFileError(
            f"{path} has no key ending in .delta_vector.activation_scaling or _bias (found {some})"
        )
    if ignored:
        logger.warning(
            "fastedit: %s: ignored %d keys that are not RED's, such as %s", path, len(ignored), ignored[0]
        )
    for module, parts in found.items():
        if len({part.numel() for part in parts.values()}) > 1:
            raise EditFileError(f"{path}: scale and bias of {module} differ in width")
    return found


def _sites(model):
    """{module path in the model: (layer number, site)}"""
    names = {module: name for name, module in model.named_modules()}
    return {
        names[layer.at(site)]: (layer.index, site)
        for layer in find_layers(model)
        for site in ("mlp", "attn", "q", "k", "v")
        if isinstance(layer.place(site), str) and layer.at(site) is not None
    }


def _place(path, module, sites):
    """A file's module path on this model: the same, or with a wrapper's prefix added or removed."""
    for name, place in sites.items():
        if name == module or name.endswith("." + module) or module.endswith("." + name):
            return place
    raise EditFileError(
        f"{path} edits {module}, which is not a site of this model ({', '.join(list(sites)[:2])}, …); "
        "load the base it was trained on, and note that q, k and v of a fused projection have no vectors of their own there"
    )
