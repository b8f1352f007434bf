"""Edits that only scale, written as PEFT's (IA)³ adapter (arXiv 2205.05638)."""

import json
from pathlib import Path

from safetensors.torch import save

from ..edits.form import at_strength, fold_all
from ..families import Input, Part
from ..families.own_class import base_of
from ..files.edit_file import replace_all
from ..hints import Folder
from ..patching.base_model import describe_base
from ..patching.handle import Handle
from ..patching.merge import is_conv1d, is_linear
from .folders import PEFT_CONFIG, PEFT_PREFIX, PEFT_TENSORS, check_export


def save_peft(handle: Handle, folder: Folder, *, task_type: str | None = None) -> Path:
    """Write a handle's edits, at their present strength, as an (IA)³ adapter that PEFT loads. Returns the folder's Path.

    Served are scales alone, on every token, at the output or input of a linear map: (IA)³, and RED whose bias is zero.

    Args:
        task_type: of PEFT, such as "CAUSAL_LM", for its configuration.

    Raises:
        ValueError: an edit that (IA)³ does not express. Nothing is written.
    """
    check_export(handle)
    paths = {module: path for path, module in handle.model.named_modules()}
    tensors, inputs = {}, []
    for (layer, site), stack in _stacks(handle).items():
        module = layer.at(site)
        scale = _scale(f"site {site!r} of layer {layer.name}", layer, site, module, stack)
        name = f"{PEFT_PREFIX}{paths[module]}.ia3_l"
        if name in tensors:
            raise ValueError(f"{paths[module]} is scaled at its input and its output, and (IA)3 has one vector there")
        onto_input = isinstance(layer.place(site), Input)
        tensors[name] = scale.reshape((1, -1) if onto_input else (-1, 1)).contiguous()
        inputs += [paths[module]] if onto_input else []
    modules = [name.removeprefix(PEFT_PREFIX).removesuffix(".ia3_l") for name in tensors]
    config = {
        "peft_type": "IA3", "task_type": task_type, "base_model_name_or_path": describe_base(handle.model)["model"],
        "target_modules": modules, "feedforward_modules": inputs, "inference_mode": True, "init_ia3_weights": True,
        "fan_in_fan_out": any(is_conv1d(handle.model.get_submodule(path)) for path in modules), "modules_to_save": None,
    }  # fmt: skip
    files = {PEFT_TENSORS: save(tensors, {"format": "pt"}), PEFT_CONFIG: json.dumps(config, indent=2).encode() + b"\n"}
    replace_all(folder, files, last=PEFT_CONFIG)
    return Path(folder)


def _stacks(handle):
    found = {}
    for edit, layer, masters in handle._each():
        found.setdefault((layer, edit.site), []).append(masters)
    return found


def _scale(where, layer, site, module, stack):
    """The one scale that a stack of masters is, fp32 on the CPU."""
    for masters in stack:
        if masters.positions or masters.gating is not None or masters.keep_norm or masters.is_probe:
            raise ValueError(f"{where}: (IA)3 scales every token; this edit has positions, a gate, keep_norm, or is a probe")
    if isinstance(layer.place(site), Part) or not (is_linear(base_of(module)) or is_conv1d(module)):
        raise ValueError(f"{where} is not a linear map of its own, as PEFT's (IA)3 needs: {type(module).__name__}")
    form = fold_all([at_strength(masters.form(), masters.strength) for masters in stack])
    if form.scale is None or form.read is not None or (form.bias is not None and bool(form.bias.any())):
        raise ValueError(f"{where}: (IA)3 is a scale alone; this edit has a bias, a low-rank part, or no scale")
    return form.scale.detach().float().cpu()
