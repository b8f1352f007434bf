"""Adapters that PEFT and pyreft have saved, read from their files alone: neither library is needed.

    handle = fastedit.load_adapter(model, "my-ia3")                       # PEFT's (IA)3
    handle = fastedit.load_adapter(model, "my-reft", positions="last 1")    # pyreft's LoReFT and its kin

PEFT: adapter_config.json and adapter_model.safetensors. pyreft: config.json, and intkey_*.bin for each intervention, which
are read as plain tensors and not executed.
"""

import re
from types import SimpleNamespace

import torch
from torch import nn

from ..edits.form import Form
from ..families import find_layers
from ..files.edit_file import EditFileError
from ..files.sealed import Damaged, parse_json, plain_tensors, read_regular
from ..hints import Folder, WhichTokens
from ..patching import edit_folder
from ..patching.handle import Handle, patch_as
from .adopt import edits_of
from .found import IN_MODULE, Found, Refusal, values
from .places import Places
from .pyreft import KINDS
from .red import read_state

PEFT_CONFIG, PEFT_TENSORS = "adapter_config.json", "adapter_model.safetensors"
FILES = (PEFT_CONFIG, PEFT_TENSORS, "config.json", "intkey_*.bin")
PEFT_PREFIX = "base_model.model."
_SMALL, _LARGE = 16 << 20, 4 << 30
COMPONENTS = {  # of pyvene, whose outputs are ours
    "block_output": "block", "mlp_output": "mlp", "attention_output": "attn", "query_output": "q", "key_output": "k",
    "value_output": "v", "mlp_activation": None,
}  # fmt: skip
_PATH = re.compile(r"(.+)\.(output|input)")


def check_export(handle):
    """Refuse a handle that is not one edit in force: a removed or merged one, or one of tenants."""
    handle._changeable()
    if handle.tenancy is not None:
        raise ValueError("this handle holds tenants: save one by handle.save(folder, tenant=0), load it, and write that")


def load_adapter(
    model: nn.Module, folder: Folder, *, positions: WhichTokens = None, revision: str | None = None, fused: bool = True
) -> Handle:
    """Patch a model with an adapter that PEFT or pyreft has saved. Returns the Handle; its edits are frozen.

    Args:
        model: the base, without the adapter.
        folder: PEFT's, of an (IA)³ adapter; or pyreft's, of LoReFT, NoReFT, DiReFT or NodiReFT. A folder or a Hub repo id.
        positions: of pyreft's, which does not save them: as of an edit ("last 1", "all", "first 3 + last 3", …). Needed there.
        revision: of the Hub repo. fused: as for `fastedit.patch`.

    Raises:
        EditFileError: the folder holds no such adapter, is damaged, or does not fit the model. Nothing has changed.
    """
    folder = edit_folder.fetch(folder, revision, patterns=FILES)
    layers = find_layers(model)
    try:
        before = _written(folder)
        if (folder / PEFT_CONFIG).exists():
            found = list(_peft(model, folder))
            if positions is not None:
                raise Refusal("positions are pyreft's, and this is PEFT's (IA)3, which acts on every token")
        elif (folder / "config.json").exists():
            found = list(_pyreft(model, layers, folder, positions))
        else:
            raise Refusal(f"expected {PEFT_CONFIG} (PEFT) or config.json and intkey_*.bin (pyreft)")
        if _written(folder) != before:  # some of it may be of another adapter
            raise Refusal("it was changed while it was read: load it again")
        if not found:
            raise Refusal("its adapter changes nothing: there is nothing to load")
        places = Places(layers)
        for one in found:
            _put(places, one)
    except Refusal as refusal:
        raise EditFileError(f"{folder}: {refusal}") from None
    return patch_as(Handle, model, edits_of(found), fused=fused)


def _written(folder):
    """What tells one writing of a folder's configuration from another: a writer makes it anew (edit_file.replace_all)."""
    return [(name, said.st_ino, said.st_mtime_ns) for name in (PEFT_CONFIG, "config.json") if (said := _stat(folder / name))]


def _stat(path):
    try:
        return path.stat()
    except OSError:
        return None


def _put(places, one):
    try:
        places.put(one)
    except Refusal as refusal:
        raise Refusal(f"{one.name}: {refusal}") from None


def _json(path):
    try:
        found = parse_json(read_regular(path, _SMALL))
    except (Damaged, OSError) as error:
        raise Refusal(f"{path.name} could not be read: {error}") from None
    if not isinstance(found, dict):
        raise Refusal(f"{path.name} holds a {type(found).__name__}, expected an object")
    return found


def _submodule(model, path):
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise Refusal(f"this model has no module {path!r}: load the base that it was trained on") from None


# --- PEFT -------------------------------------------------------------------------------------------------------


def _peft(model, folder):
    kind = _json(folder / PEFT_CONFIG).get("peft_type")
    if kind != "IA3":
        raise Refusal(
            f"it is PEFT's {kind!r:.40}, of which (IA)3 alone edits representations; load it with peft, and patch beside it"
        )
    try:
        tensors = plain_tensors(read_regular(folder / PEFT_TENSORS, _LARGE))
    except FileNotFoundError:
        raise Refusal(f"it has no {PEFT_TENSORS}: save it again with safe_serialization=True") from None
    except (Damaged, OSError) as error:
        raise Refusal(f"{PEFT_TENSORS} {error}") from None
    for name, tensor in tensors.items():
        path = re.fullmatch(rf"(?:{re.escape(PEFT_PREFIX)})?(.+)\.ia3_l(?:\.default)?", name)
        if path is None:
            raise Refusal(f"{PEFT_TENSORS} holds {name!r:.80}, expected ….ia3_l")
        if tensor.dim() != 2 or 1 not in tensor.shape:
            raise Refusal(f"{name} has shape {tuple(tensor.shape)}, expected (outputs, 1) or (1, inputs)")
        side = "input" if tensor.shape[0] == 1 else "output"
        form = Form(scale=values(tensor, -1))
        _check_finite(name, form)
        yield Found(f"(IA)3 at {path[1]}", _submodule(model, path[1]), IN_MODULE, None, side, forms=(form,))


def _check_finite(name, form):
    if any(tensor is not None and not tensor.isfinite().all() for tensor in form.tensors()):
        raise Refusal(f"{name} holds values that are NaN or infinite")


# --- pyreft -----------------------------------------------------------------------------------------------------


def _pyreft(model, layers, folder, positions):
    config = _json(folder / "config.json")
    keys, kinds = config.get("sorted_keys"), config.get("intervention_types")
    members = config.get("representations")
    if not all(isinstance(part, list) for part in (keys, kinds, members)) or not len(keys) == len(kinds) == len(members):
        raise Refusal("its config.json is none that pyreft or pyvene saves: sorted_keys, intervention_types, representations")
    if positions is None:
        raise Refusal("pyreft does not save at which tokens it intervened: give positions=, such as \"last 1\" or \"all\"")
    if config.get("mode", "parallel") != "parallel":
        raise Refusal(f"it intervenes in {config['mode']!r} mode, where one intervention's result feeds the next")
    for key, kind, member in zip(keys, kinds, members, strict=True):
        name = str(kind).strip("<>'").rpartition(".")[2].strip("'")
        if not isinstance(key, str) or "/" in key or "\\" in key:
            raise Refusal(f"it names an intervention {key!r:.60}")
        if not isinstance(member, list) or len(member) < 10:
            raise Refusal(f"the representation of {key} is {member!r:.60}")
        if any(member[at] is not None for at in (7, 8, 9)) or name not in _STATES:
            raise Refusal(f"{key} is {name}; read are {', '.join(_STATES)}, not linked, grouped or in subspaces")
        module, side = _where(model, layers, member[0], member[1])
        form = KINDS[name](_STATES[name](folder / f"intkey_{key}.bin"))
        _check_finite(f"intkey_{key}.bin", form)
        yield Found(f"{name} at {member[1]} of layer {member[0]}", module, IN_MODULE, None, side, forms=(form,),
                    positions=positions)  # fmt: skip


def _where(model, layers, number, component):
    """(module, side) of a component: of a name, or of a path such as model.layers[3].output."""
    path = _PATH.fullmatch(re.sub(r"\[(\d+)\]", r".\1", str(component)))
    if path is not None:
        return _submodule(model, path[1]), path[2]
    site = COMPONENTS.get(component) if isinstance(component, str) else None
    if site is None or not isinstance(number, int) or not 0 <= number < len(layers):
        raise Refusal(f"it intervenes at {component!r:.60} of layer {number!r}, which is no site here")
    return layers[number].at(site), "output"


def _learned(path, keys):
    state = read_state(path, "an intervention's tensors, as pyreft saves them")
    missing = [key for key in keys if not isinstance(state.get(key), torch.Tensor)]
    if missing:
        raise Refusal(f"{path.name} has no {', '.join(missing)}; it has {', '.join(map(str, state))}")
    return state


def _part(state, prefix=""):
    return SimpleNamespace(weight=state.get(f"{prefix}weight"), bias=state.get(f"{prefix}bias"))


def _rotated(path):
    """LoReFT and DiReFT: the source's weight and bias, and the rotation (width, rank)."""
    state = _learned(path, ("weight", "bias", "rotate_layer"))
    return SimpleNamespace(learned_source=_part(state), rotate_layer=SimpleNamespace(weight=state["rotate_layer"]))


def _projected(path):
    """NoReFT and NodiReFT: two linear maps."""
    state = _learned(path, ("learned_source.weight", "learned_source.bias", "proj_layer.weight"))
    return SimpleNamespace(learned_source=_part(state, "learned_source."), proj_layer=_part(state, "proj_layer."))


_STATES = {
    "LoreftIntervention": _rotated, "DireftIntervention": _rotated, "NoreftIntervention": _projected,
    "NodireftIntervention": _projected,
}  # fmt: skip
