"""Edits of low rank, written as pyreft's LoReFT (arXiv 2404.03592).

Any h + writeᵀ (read h + offset) is a LoReFT h + Rᵀ (W h + b − R h): with writeᵀ = Rᵀ U, R's rows orthonormal (a QR
decomposition), W = U read + R and b = U offset. A bias is a row of its own: read 0, offset 1, written along it.
"""

import io
import json
from pathlib import Path

import torch

from ..edits.form import at_strength, fold_all
from ..files.edit_file import replace_all
from ..hints import Folder
from ..patching.handle import Handle
from .folders import COMPONENTS, check_export

KIND = "<class 'pyreft.interventions.LoreftIntervention'>"
_MEMBER = [None, None, "pos", 1, None, *[None] * 9]  # pyvene's RepresentationConfig: layer, component, unit, units, rank


def save_pyreft(handle: Handle, folder: Folder) -> Path:
    """Write a handle's edits, at their present strength, as LoReFT that pyreft loads. Returns the folder's Path.

    Served are edits at "block", "mlp" and "attn" that scale nothing: LoReFT and its kin, steering, ablation, folded at each
    place. pyreft does not save at which tokens it acts: its calls name them, `unit_locations`. Its `load` makes LoReFT's
    source bfloat16.

    Args:
        handle: of a model with one stack of layers. folder: to write to.

    Raises:
        ValueError: an edit that LoReFT does not express. Nothing is written.
    """
    check_export(handle)
    if len({json.dumps(edit["positions"]) for edit in handle.config()}) > 1:
        raise ValueError("the edits act on different tokens, and a call of pyreft's names one set of them: save them apart")
    stacks = {}
    for edit, layer, masters in handle._each():
        stacks.setdefault((layer, edit.site), []).append(masters)
    states = {}
    for (layer, site), stack in stacks.items():
        where = f"site {site!r} of layer {layer.name}"
        component = next((name for name, ours in COMPONENTS.items() if ours == site), None)
        head, _, number = layer.name.rpartition(".")
        if component is None or site not in ("block", "mlp", "attn") or head != "layers":
            raise ValueError(f"{where}: pyreft is given edits at block, mlp and attn of a decoder's or an encoder's layers")
        states[int(number), component] = _loreft(where, stack)
    keys = [f"layer_{number}_comp_{component}_unit_pos_nunit_1#0" for number, component in states]
    config = {
        "model_type": str(type(handle.model)), "mode": "parallel", "sorted_keys": keys, "intervention_types": [KIND] * len(keys),
        "representations": [
            [number, component, *_MEMBER[2:4], len(state["bias"]), *_MEMBER[5:]] for (number, component), state in states.items()
        ],
        "intervention_dimensions": [[state["weight"].shape[1]] for state in states.values()],
        "intervention_constant_sources": [True] * len(keys),
    }  # fmt: skip
    files = {f"intkey_{key}.bin": _archive(state) for key, state in zip(keys, states.values(), strict=True)}
    files["config.json"] = json.dumps(config, indent=2).encode() + b"\n"
    replace_all(folder, files, last="config.json")
    return Path(folder)


def _archive(state):
    written = io.BytesIO()
    torch.save(state, written)
    return written.getvalue()


def _loreft(where, stack):
    """LoReFT's tensors of a stack of masters, fp32 on the CPU."""
    if any(masters.gating is not None or masters.keep_norm or masters.is_probe for masters in stack):
        raise ValueError(f"{where}: LoReFT has no gate and no keep_norm, and is no probe")
    form = fold_all([at_strength(masters.form(), masters.strength) for masters in stack])
    if form.scale is not None:
        raise ValueError(f"{where}: LoReFT scales nothing; this edit has a scale")
    width = form.width
    read, write, offset = (torch.zeros(0, *shape, dtype=torch.float64) for shape in ((width,), (width,), ()))
    if form.read is not None:
        read, write = (tensor.detach().cpu().double() for tensor in (form.read, form.write))
        offset = torch.zeros(len(read), dtype=torch.float64) if form.offset is None else form.offset.detach().cpu().double()
    if form.bias is not None:
        read, offset = torch.cat([read, torch.zeros(1, width, dtype=torch.float64)]), torch.cat([offset, torch.ones(1).double()])
        write = torch.cat([write, form.bias.detach().cpu().double()[None]])
    rotate, upper = torch.linalg.qr(write.T)
    state = {"weight": upper @ read + rotate.T, "bias": upper @ offset, "rotate_layer": rotate}
    return {name: tensor.float().contiguous() for name, tensor in state.items()}
