"""The tables of a bank: for each place in a model, the tensors of every resident edit, allocated once.

A slot is a row of every table. Tables know names and widths and no model. So whatever runs layers (a Hugging Face
model, a serving engine's worker) can keep them. The kernels take `Tables.tensors(layer, site)` and a slot for each row.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from ..arguments import MAX_RANK, MOST_SLOTS
from ..edits.form import Form
from ..edits.kinds import TENSORS
from ..ops.fp32_module import InFp32

_LOW_RANK = ("read", "offset", "write")
_TABLES = (*TENSORS, "gate", "rule")
_OPEN = torch.tensor([-1.0, 0.0, 0.0])  # the rule of an edit without a gate: a product with zeros is above −1


class Group(NamedTuple):
    """Places of one width on one device. Their tables are slices of one tensor, so an edit is one copy per tensor."""

    width: int
    places: tuple  # (layer name, site name)


class Staged:
    """One edit as `Tables.write` takes it: for each Group {name: (places, …) fp32 on the host}.

    A missing name stands for the identity.
    """

    def __init__(self, parts):
        self.parts = parts

    @property
    def nbytes(self):
        return sum(tensor.nbytes for part in self.parts for tensor in part.values())

    def numel(self):
        return sum(tensor.numel() for part in self.parts for tensor in part.values())

    def named(self):
        """{"0.scale": tensor}, for a file."""
        return {f"{number}.{name}": t for number, part in enumerate(self.parts) for name, t in part.items()}


class Tables(InFp32):
    """fp32 tables for `capacity` edits at every place.

    Always: scale and bias (capacity, width). If there is a rank: read and write (capacity, rank, width) and offset
    (capacity, rank). If there are gates: gate (capacity, width) and rule (capacity, 3). An empty slot holds the identity,
    and an open gate.

    Args:
        sites: [(layer name, site name, width)].
        capacity: how many edits are resident at once.
        rank: the largest rank of their low-rank parts. 0 for none, and no such tables.
        device: one for all, or {(layer name, site name): device}.
        gates: whether an edit may be behind a gate.

    Raises:
        ValueError: a capacity, rank or place that makes no sense.
    """

    def __init__(self, sites, capacity, rank=0, device="cpu", gates=False):
        self.check(capacity, rank)
        super().__init__()
        self.capacity, self.rank, self.gates = capacity, rank, bool(gates)
        grouped = {}
        for layer, site, width in sites:
            where = torch.device(device[layer, site] if isinstance(device, Mapping) else device)
            grouped.setdefault((width, where), []).append((layer, site))
        self.groups = [Group(width, tuple(places)) for (width, _), places in grouped.items()]
        self.places = {p: (number, row) for number, g in enumerate(self.groups) for row, p in enumerate(g.places)}
        if not self.places or len(self.places) != sum(len(g.places) for g in self.groups):
            raise ValueError("sites is empty or names a place twice, expected (layer name, site name, width) of each place")
        self.free = list(range(capacity))[::-1]
        with torch.inference_mode(False):
            for number, (_, where) in enumerate(grouped):
                for name, shape in self._shapes(self.groups[number]).items():
                    table = torch.empty(shape, device=where)
                    _neutral(name, table)
                    self.register_buffer(f"{name}{number}", table, persistent=False)
        self._look()

    @staticmethod
    def check(capacity, rank):
        if isinstance(capacity, bool) or not isinstance(capacity, int) or not 1 <= capacity < MOST_SLOTS:
            raise ValueError(
                f"capacity is {capacity!r:.60}, expected how many edits are resident at once, from 1 on and below 2^31"
            )
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= MAX_RANK:
            raise ValueError(f"rank is {rank!r}, expected a whole number from 0 (no low-rank edits) to {MAX_RANK}")

    def _shapes(self, group):
        rows, low_rank = (len(group.places), self.capacity), (self.rank, group.width)
        shapes = {"scale": (*rows, group.width), "bias": (*rows, group.width)}
        if self.rank:
            shapes |= {"read": (*rows, *low_rank), "offset": (*rows, self.rank), "write": (*rows, *low_rank)}
        if self.gates:
            shapes |= {"gate": (*rows, group.width), "rule": (*rows, 3)}
        return shapes

    # --- what the kernels take ------------------------------------------------------------------------------

    def tensors(self, layer, site):
        """(scale, bias, read, offset, write) of a place, each with a leading slot dimension. They never move."""
        return self._views[layer, site][:5]

    def gate(self, layer, site):
        """(gate, rule) of a place, each with a leading slot dimension. None if the tables have no gates."""
        return self._views[layer, site][5:] if self.gates else None

    def _look(self):
        self._views = {
            place: tuple(None if table is None else table[row] for table in self._of_group(number))
            for place, (number, row) in self.places.items()
        }

    def _of_group(self, number):
        return tuple(self._buffers.get(f"{name}{number}") for name in _TABLES)

    def devices(self):
        return {table.device for table in self._buffers.values()}

    def _apply(self, fn, recurse=True):
        applied = super()._apply(fn, recurse)
        self._look()
        return applied

    def __getstate__(self):
        return self.__dict__ | {"_views": {}}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._look()

    # --- slots ----------------------------------------------------------------------------------------------

    def take(self):
        """A free slot, or None."""
        return self.free.pop() if self.free else None

    def give(self, slot):
        """Make a slot free again. Its rows stay as they are until the next write, which replaces all of them."""
        self.free.append(slot)

    def stage(self, forms, gates=None):
        """One edit for `write`, from its normal forms {(layer name, site name): Form} and its gates.

        gates: {(layer name, site name): (gate (width,), rule (3,))}, at some of these places, as `ops.edit` takes them.

        Raises:
            ValueError: a place that is not served, another width, a rank above the tables', a gate without tables of
                gates, or NaN. Nothing is written.
        """
        gates = gates or {}
        for place, form in forms.items():
            self._check(place, form)
        for place, gate in gates.items():
            self._check_gate(place, gate)
        pin = any(device.type == "cuda" for device in self.devices())
        parts = [_stacked(group, [forms.get(place, _IDENTITY) for place in group.places]) for group in self.groups]
        for part, group in zip(parts, self.groups, strict=True):
            part.update(_stacked_gates(group, gates))
        return Staged([{n: t.pin_memory() for n, t in part.items()} for part in parts] if pin else parts)

    def _check(self, place, form):
        layer, site = place
        if place not in self.places:
            sites = ", ".join(sorted({repr(s) for _, s in self.places}))
            raise ValueError(
                f"the edit acts at site {site!r} of layer {layer}, which this bank does not serve: it serves {sites} of "
                f"{len({name for name, _ in self.places})} layers; make the bank with sites= and layers= that hold it"
            )
        width = self.groups[self.places[place][0]].width
        if form.width not in (None, width):
            raise ValueError(f"the edit has width {form.width}, but site {site!r} of layer {layer} is {width} wide")
        if form.rank > self.rank:
            raise ValueError(
                f"the edit has rank {form.rank} at site {site!r} of layer {layer} (ranks of edits at one site add up), "
                f"and this bank was made for rank {self.rank}: make it with rank={form.rank} or more"
            )
        for name, tensor in zip(TENSORS, form.tensors(), strict=True):
            if tensor is not None and not _is_finite(tensor):
                raise ValueError(f"the edit's {name} at site {site!r} of layer {layer} holds values that are NaN or infinite")

    def _check_gate(self, place, gate):
        layer, site = place
        if not self.gates:
            raise ValueError(
                f"the edit at site {site!r} of layer {layer} is behind a gate: make the bank with gates=True, which has "
                "tables for one"
            )
        if not all(_is_finite(tensor) for tensor in gate):
            raise ValueError(f"the edit's gate at site {site!r} of layer {layer} holds values that are NaN or infinite")

    def staged_gates(self, staged, places):
        """{(layer name, site name): (gate, rule)} of what `stage` made, at places that have one."""
        found = {}
        for place in places:
            number, row = self.places[place]
            found[place] = staged.parts[number]["gate"][row], staged.parts[number]["rule"][row]
        return found

    def forms(self, staged, ranks):
        """{(layer name, site name): Form} of what `stage` made, at the places and ranks {place: rank} that it had."""
        found = {}
        for place, rank in ranks.items():
            number, row = self.places[place]
            rows = {name: tensor[row] for name, tensor in staged.parts[number].items()}
            low_rank = {name: rows[name][:rank] for name in _LOW_RANK} if rank else {}
            found[place] = Form(rows.get("scale"), rows.get("bias"), **low_rank)
        return found

    def staged_from(self, named):
        """The Staged of what its `named` returned, read back from a file."""
        parts = [{} for _ in self.groups]
        for key, tensor in named.items():
            number, _, name = key.partition(".")
            parts[int(number)][name] = tensor
        return Staged(parts)

    @torch.no_grad()
    def write(self, slot, staged):
        """Put an edit into a slot: a row of every table, in place."""
        for number, part in enumerate(staged.parts):
            for name, table in zip(_TABLES, self._of_group(number), strict=True):
                if table is None:
                    continue
                rows, given = table[:, slot], part.get(name)
                if given is None:
                    _neutral(name, rows)
                elif name in _LOW_RANK and given.shape[1] < self.rank:
                    _copy(rows[:, : given.shape[1]], given)
                    rows[:, given.shape[1] :].zero_()
                else:
                    _copy(rows, given)

    def clear(self, slot):
        """Make a slot the identity."""
        self.write(slot, Staged([{} for _ in self.groups]))

    def extra_repr(self):
        return f"{len(self.places)} places, capacity {self.capacity}, rank {self.rank}{', gates' if self.gates else ''}"


_IDENTITY = Form()


def _neutral(name, rows):
    """The value of a tensor that an edit does not have."""
    if name == "rule":
        rows.copy_(_OPEN)
    else:
        rows.fill_(1.0 if name == "scale" else 0.0)


def _copy(rows, given):
    """Copy on a CPU place by place.

    Each copy is too small to wake other threads, which a busy machine keeps waiting (12 ms for 262,144 numbers, against
    0.2).
    """
    if rows.is_cpu:
        torch._foreach_copy_(list(rows.unbind()), list(given.unbind()))
    else:
        rows.copy_(given, non_blocking=True)


def _is_finite(tensor):
    return math.isfinite(tensor.detach().sum()) or bool(tensor.isfinite().all())  # a finite sum has no NaN in it


def _stacked(group, forms):
    """{name: (places, …) fp32 on the host} of a group's forms, without the names that no form has."""
    part = {}
    for name, neutral in (("scale", 1.0), ("bias", 0.0)):
        given = [getattr(form, name) for form in forms]
        if any(tensor is not None for tensor in given):
            blank = torch.full((group.width,), neutral)
            part[name] = torch.stack([blank if t is None else _on_host(t) for t in given])
    rank = max(form.rank for form in forms)
    if rank:
        shapes = {"read": (rank, group.width), "offset": (rank,), "write": (rank, group.width)}
        part |= {name: torch.zeros(len(forms), *shape) for name, shape in shapes.items()}
        for row, form in enumerate(forms):
            for name in _LOW_RANK:
                if getattr(form, name) is not None:
                    part[name][row, : form.rank] = _on_host(getattr(form, name))
    return part


def _stacked_gates(group, gates):
    """{"gate": (places, width), "rule": (places, 3)} on the host, open where there is no gate. {} without any."""
    if not any(place in gates for place in group.places):
        return {}
    blank = torch.zeros(group.width), _OPEN
    found = [gates.get(place, blank) for place in group.places]
    return {name: torch.stack([_on_host(one[n]) for one in found]) for n, name in enumerate(("gate", "rule"))}


def _on_host(tensor):
    return tensor.detach().to("cpu", torch.float32)
