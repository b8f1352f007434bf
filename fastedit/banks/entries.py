"""What a bank holds under a name: an edit folded to one normal form per place, and where it is kept.

Whatever is added (an Edit, a stack of them, a Handle, a folder or Hub repo) becomes one form at each place, with
strengths folded in. What has no single normal form is refused here, before anything changes.
"""

import contextlib
import hashlib
import secrets
from pathlib import Path

import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes

from ..arguments import as_list
from ..edits.form import at_strength, fold_all
from ..edits.gates import outside_kernels
from ..edits.kinds import Edit
from ..edits.per_layer import Spot
from ..edits.sites import MODEL_SITES, check_site
from ..edits.stack import check_gates, check_positions, steepest
from ..files.sealed import Damaged, read_regular
from ..patching import edit_folder as store
from ..patching.handle import Handle
from ..patching.layer_plan import choose, device_at, width_at
from ..patching.masters import masters_of
from ..patching.rows.gate_sensors import Sensor, kernel_gate


class Entry:
    """One name's edit. staged: its host copy, or None. path: its file, or None. slot: where it is resident, or None.

    ranks: {place: rank}. gated: the places with a gate. uses: assignments in force that hold it. folding: how many
    stacks are being made of its host copy. gone: removed or replaced; what is left of it ends with the last use.
    """

    parts = ()

    def __init__(self, name, staged, positions, ranks, gated=()):
        self.name, self.staged, self.positions, self.nbytes = name, staged, positions, staged.nbytes
        self.ranks, self.gated = ranks, tuple(gated)
        self.path = self.slot = self.ready = None
        self.uses, self.folding, self.pinned, self.gone = 0, 0, False, False


class Combination(Entry):
    """Several names' edits at strengths, as one. It exists while it has a slot, and is made again of its parts' host
    copies.

    key: its parts and strengths. Parts are entries, not names: after a replacement the combination is another one.
    """

    staged, nbytes, pinned, folding = None, 0, False, 0

    def __init__(self, stack, parts, key, rank):
        """rank: of the tables. Raises ValueError if the parts cannot be one."""
        check_positions([(repr(part.name), part.positions) for part in parts])
        check_gates([(repr(part.name), part.ranks, part.gated) for part in parts])
        need, place = steepest([part.ranks for part in parts])
        if need > rank:
            raise ValueError(
                f"{stack!r} has rank {need} at site {place[1]!r} of layer {place[0]} (ranks of a stack add up), and this "
                f"bank was made for rank {rank}: make it with rank={need} or more"
            )
        self.name, self.parts, self.key, self.strengths, self.positions = stack, parts, key, stack.strengths, parts[0].positions
        self.path = self.slot = self.ready = None
        self.uses, self.gone = 0, False


def forms_of(source, model, layers, positioned):
    """({(layer name, site name): Form}, {such a place: (gate, rule)}, positions) of whatever a user adds.

    layers: the model's. positioned: whether the bank's edits may have positions.

    Raises:
        TypeError, ValueError, EditFileError: an edit without one normal form per place, or one that does not fit the
            model.
    """
    if isinstance(source, Handle):
        parts = _of_handle(source)
    elif isinstance(source, (str, Path)):
        parts = _of_folder(source, model, layers)
    else:
        parts = _of_edits(source, layers)
    stacks, gates, positions = {}, {}, set()
    for edit, place, form, gate in parts:
        positions.add(edit.positions)
        stacks.setdefault(place, []).append(form)
        if gate is not None:
            gates[place] = gate
    crowded = next((place for place in gates if len(stacks[place]) > 1), None)
    if crowded is not None:
        raise ValueError(
            f"{len(stacks[crowded])} edits of one name are at site {crowded[1]!r} of layer {crowded[0]}, one of them behind a "
            "gate: a gate decides on what its edit is given, so a gated edit must be alone at its place; patch them"
        )
    if len(positions) > 1:
        spelled = ", ".join(sorted(repr("all" if p is None else str(p)) for p in positions))
        raise ValueError(f"the edits of one name share their positions, found {spelled}: a slot has one coefficient per row")
    found = positions.pop() if positions else None
    if found is not None and not positioned:
        raise ValueError(f"the edit has positions {str(found)!r}: make the bank with positions=True, which looks at tokens")
    return {place: fold_all(forms) for place, forms in stacks.items()}, gates, found


def _of_handle(handle):
    if handle.tenancy is not None:
        raise ValueError("this handle holds several tenants' edits: add the edit of one tenant, such as handle.tenant(0)")
    for edit in handle.edits:
        _check_kind(edit)
    with torch.no_grad():
        return [
            (edit, (layer.name, edit.site), at_strength(masters.form(), masters.strength), _gate_of(kernel_gate(masters)))
            for edit, layer, masters in handle._each()
        ]


def _gate_of(sensor):
    return None if sensor is None else sensor.gate()


def _of_folder(folder, model, layers):
    edits, tensors, strength = store.opened(model, store.fetch(folder))
    held = [{} for _ in edits]
    for number, edit in enumerate(edits):
        _check_kind(edit)
        for layer in choose(edit, layers):
            prefix = f"{number}.{layer.name}.{edit.site}."
            held[number][layer.index] = {name: tensors[prefix + name] for name in edit.names}
        if edit.gate is not None:
            at = {layer.index: f"{number}.{layer.name}.{edit.site}.gate0." for layer in choose(edit, layers)}
            edit.gate.hold(*({i: tensors[a + name] for i, a in at.items()} for name in ("condition", "threshold")))
    return _of_edits([edit.holding(own) for edit, own in zip(edits, held, strict=True)], layers, strength)


def _of_edits(edits, layers, strength=1.0):
    edits = [edits] if isinstance(edits, Edit) else edits
    if not isinstance(edits, (list, tuple)) or not all(isinstance(edit, Edit) for edit in edits):
        found = type(edits).__name__ if not isinstance(edits, (list, tuple)) else [type(e).__name__ for e in edits]
        raise TypeError(f"edits is {found}, expected an Edit, a list of them, a Handle, or a folder written by handle.save")
    if not edits:
        raise ValueError("edits is empty: there is nothing to add")
    for edit in edits:
        _check_kind(edit)
    return [part for edit in edits for part in _of_edit(edit, layers, strength * edit.strength)]


def _of_edit(edit, layers, strength):
    chosen = choose(edit, layers)
    with torch.inference_mode(False), torch.no_grad():
        for order, layer in enumerate(chosen):
            spot = Spot(layer.name, layer.index, len(layers), order, len(chosen), edit.site in MODEL_SITES)
            width = width_at(layer, edit.site)
            if edit.derive is None:
                form = edit.form(edit.tensors(spot, width))
            else:  # masters bring a basis to orthonormal rows before anything is derived from it
                form = masters_of(edit, spot, width, torch.device("cpu")).form()
            sensor = None if edit.gate is None else Sensor(edit.gate, "bank", spot, width, torch.device("cpu"))
            yield edit, (layer.name, edit.site), at_strength(form, strength), _gate_of(sensor)


def _check_kind(edit):
    why = None
    if edit.is_probe:
        why = "a Probe reads and edits nothing: patch it with fastedit.patch"
    elif edit.gate is not None and outside_kernels(edit.gate) is not None:
        why = (
            f"{outside_kernels(edit.gate)}; a bank with gates=True holds one dot or cosine gate, decided by token on what the "
            "edit is given: patch it separately, or decide yourself and dial it by assign(strengths=)"
        )
    elif edit.keep_norm:
        why = "keep_norm rescales each row behind the edit, which no normal form does: patch it separately"
    if why is not None:
        raise ValueError(f"a bank cannot hold {edit!r}: {why}")


def places_of(layers, sites, wanted):
    """([(layer name, site name, width)], {(layer name, site name): device}) of what a bank serves.

    Raises:
        ValueError: no such site or layer, or weights without memory yet (meta).
    """
    sites = [sites] if isinstance(sites, str) else as_list("sites", sites, "the name of a site, or a list of them")
    sites = tuple(dict.fromkeys(map(check_site, sites)))
    if not sites:
        raise ValueError("sites is empty: the bank would serve nothing")
    found, devices = [], {}
    for site in sites:
        where = Edit((), site=site, layers=wanted)
        for layer in choose(where, layers):
            device = device_at(layer, site)
            if device.type == "meta":
                raise ValueError(f"layer {layer.name} is on meta: give the model its weights before the bank")
            found.append((layer, site, width_at(layer, site)))
            devices[layer.name, site] = device
    return found, devices


# --- files ----------------------------------------------------------------------------------------------------


class Spill:
    """A folder for the edits that do not fit into host memory. Its files are the bank's own and are deleted with it."""

    def __init__(self, folder):
        self.folder, self.digests = Path(folder), {}
        self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, staged):
        """The Path of a new file. OSError if it cannot be written; then there is none."""
        payload = to_bytes({name: tensor.contiguous() for name, tensor in staged.named().items()} or {"none": torch.empty(0)})
        path = self.folder / f"bank-{secrets.token_hex(8)}.safetensors"
        try:
            path.write_bytes(payload)
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        self.digests[path] = hashlib.sha256(payload).digest()
        return path

    def read(self, path):
        """{name: tensor}

        Raises:
            RuntimeError: the file is not what was written.
        """
        try:
            payload = read_regular(path, None)
        except (Damaged, OSError) as error:
            reason = getattr(error, "strerror", None) or f"it {error}"
            raise RuntimeError(f"{path}, where the bank keeps an evicted edit, cannot be read: {reason}") from error
        if hashlib.sha256(payload).digest() != self.digests[path]:
            raise RuntimeError(f"{path}, where the bank keeps an evicted edit, was changed: remove that edit and add it again")
        named = from_bytes(payload)
        named.pop("none", None)
        return named

    def forget(self, path):
        self.digests.pop(path, None)
        with contextlib.suppress(OSError):
            path.unlink()
