"""A saved edit as a serving engine needs it: normal forms by layer number and site, found without a model.

An engine's worker has no transformers model to patch, only the layers' numbers and widths. So a file is read, checked
and turned into forms here. Edits are named by what they do: the digest of their configs, strength and tensors.
"""

import functools
import hashlib
import json
from dataclasses import dataclass

import torch

from ..edits.form import Form, at_strength
from ..edits.gates import outside_kernels
from ..edits.per_layer import Spot
from ..edits.positions import Positions
from ..files.edit_file import EditFileError, read
from ..patching.edit_folder import rebuild, strength_of
from ..patching.rows.gate_sensors import Sensor

SITES = ("mlp", "attn", "block")
_GATE = "gate0"  # an edit's first gate, in a file's names


@dataclass(frozen=True)
class Contents:
    """One saved edit.

    digest: 64 hex digits, of its configs, strength and tensors.
    parts: {(layer number, site): [Form, …]}, in the order in which they apply, their saved strengths included.
    gates: {place: (gate (width,), rule (3,))}, at places of one form, as ops.edit takes them.
    rates: {place: [number, …]}: how much each form changes typical rows, as a share of their own length.
    positions: which tokens, the same for all parts. None for all.
    """

    digest: str
    parts: dict
    gates: dict
    rates: dict
    positions: Positions | None
    header: dict
    tensors: dict

    @property
    def linear(self):
        """Whether a strength may be a row's coefficient: a folded form at strength c is not its parts at strength c."""
        return all(len(forms) == 1 for forms in self.parts.values())

    @property
    def ranks(self):
        """{place: rank}"""
        return {place: sum(form.rank for form in forms) for place, forms in self.parts.items()}

    @property
    def rank(self):
        return max(self.ranks.values(), default=0)

    @property
    def sites(self):
        return {site for _, site in self.parts}


def digest_of(header):
    """The digest of what an edit does, whatever is said about its training. header["tensors"] has the tensors'
    checksum."""
    said = {key: header.get(key) for key in ("edits", "strength")} | {"tensors": header["tensors"]["sha256"]}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def read_contents(folder, width, depth):
    """The Contents of a folder that `handle.save` wrote, for a decoder of `depth` layers `width` wide.

    Raises:
        EditFileError: it is not a whole, sound edit, does not fit the model, or does something that is not served.
    """
    header, tensors = read(folder)
    edits = rebuild(folder, header["edits"])
    for number, edit in enumerate(edits):
        reason = _not_served(edit)
        if reason:
            raise EditFileError(f"{folder}: edit {number} ({type(edit).__name__}) {reason}")
    chosen = {edit.positions for edit in edits}
    if len(chosen) > 1:
        said = " and ".join(sorted(str(p or "all") for p in chosen))
        raise EditFileError(f"{folder}: its edits are on different tokens ({said}); serve them as edits of their own")
    strength = strength_of(folder, header)
    parts, gates, rates = {}, {}, {}
    for number, by_place in enumerate(_masters(folder, edits, tensors)):
        for place, masters in by_place.items():
            _check(folder, edits[number], place, masters, width, depth)
            if edits[number].gate is not None:
                gates[place] = _gate(edits[number].gate, place, masters, width, depth)
            form = at_strength(edits[number].form(masters), edits[number].strength * strength)
            parts.setdefault(place, []).append(form)
            rates.setdefault(place, []).append(_rate(folder, form, place, width))
    crowded = min((place for place in gates if len(parts[place]) > 1), default=None)
    if crowded is not None:
        raise EditFileError(
            f"{folder}: {len(parts[crowded])} edits are at site {crowded[1]!r} of layer {crowded[0]}, one of them behind a "
            "gate, which decides on what its edit is given: a gated edit must be alone at its place"
        )
    return Contents(digest_of(header), parts, gates, rates, chosen.pop() if chosen else None, header, tensors)


def _not_served(edit):
    positions = edit.positions
    outside = None if edit.gate is None else outside_kernels(edit.gate)
    if outside is not None:
        return f"has a gate that serving does not take: {outside}; one dot or cosine gate by token at the edit's site is"
    if edit.keep_norm:
        return "has keep_norm=True, which serving does not take"
    if edit.is_probe:
        return "is a probe, which only reads: there is nothing to serve"
    if edit.site not in SITES:
        return f"acts at site {edit.site!r}, and serving has {', '.join(SITES)}"
    if positions is not None and (positions.mask or positions.tokens):
        return f"is on {positions}, and serving knows all, prompt, generated, first k and last k"
    return None


def _masters(folder, edits, tensors):
    """For each edit {(layer number, site): {name: tensor}}."""
    found = [{} for _ in edits]
    for key, tensor in tensors.items():
        number, _, rest = key.partition(".")
        where, _, name = rest.rpartition(".")
        if where.endswith(f".{_GATE}"):
            where, name = where.removesuffix(f".{_GATE}"), f"{_GATE}.{name}"
        layer, _, site = where.rpartition(".")
        index = layer.rpartition(".")[2]
        if not (number.isdigit() and int(number) < len(edits) and index.isdigit()):
            raise EditFileError(f"{folder}: tensor {key!r} belongs to no layer of its edits")
        found[int(number)].setdefault((int(index), site), {})[name] = tensor
    for number, (edit, by_place) in enumerate(zip(edits, found, strict=True)):
        for (index, site), masters in by_place.items():
            expected = {*edit.names, *(() if edit.gate is None else (f"{_GATE}.condition", f"{_GATE}.threshold"))}
            if site != edit.site or set(masters) != expected:
                raise EditFileError(
                    f"{folder}: edit {number} has {sorted(masters)} at site {site!r} of layer {index}, "
                    f"expected {sorted(expected)} at site {edit.site!r}"
                )
    return found


def _gate(gate, place, masters, width, depth):
    """(gate, rule) of a place. Its tensors are taken out of `masters`."""
    index = place[0]
    gate.hold(*({index: masters.pop(f"{_GATE}.{name}")} for name in ("condition", "threshold")))
    return Sensor(gate, "served", Spot("", index, depth), width, torch.device("cpu")).gate()


@functools.cache
def _typical(width):
    """(8, width) rows with root mean square 1, always the same ones. An edit's size is measured on them."""
    rows = torch.randn(8, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return rows / rows.square().mean(-1, keepdim=True).sqrt()


def _rate(folder, form, place, width):
    """The largest ‖h' − h‖ / ‖h‖ over typical rows h."""
    rows = _typical(width)
    rate = (Form(*(t if t is None else t.double() for t in form.tensors()))(rows) - rows).norm(dim=-1) / rows.norm(dim=-1)
    if not (all(t is None or bool(t.isfinite().all()) for t in form.tensors()) and bool(rate.isfinite().all())):
        raise EditFileError(
            f"{folder}: at its saved strength the edit at site {place[1]!r} of layer {place[0]} holds values that are NaN or "
            "infinite; save it at a lower one"
        )
    return float(rate.max())


def _check(folder, edit, place, masters, width, depth):
    index, site = place
    if index >= depth:
        raise EditFileError(f"{folder}: layer {index}, but this model has layers 0 to {depth - 1}")
    for name, tensor in masters.items():
        own = {f"{_GATE}.condition": (width,), f"{_GATE}.threshold": (1,)}
        expected = own[name] if name in own else edit.shape(name, width)
        if tuple(tensor.shape) != expected:
            raise EditFileError(
                f"{folder}: {name} at site {site!r} of layer {index} has shape {tuple(tensor.shape)}, this model "
                f"needs {expected}: it was made on another base"
            )


__all__ = ["SITES", "Contents", "EditFileError", "read_contents"]
