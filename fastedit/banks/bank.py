"""Many edits resident on one model, each under a name, mixed in one batch at the cost of one (docs/bank.md).

    bank = fastedit.Bank(model, capacity=256)
    bank.add("anna", "my-edit");  bank.add("ben", fastedit.Steer(directions))
    with bank.assign(["anna", None, "ben"]):          # one name per sequence; None = untouched
        model.generate(**batch_of_three)

Tables are allocated once (banks/tables.py). Adding an edit writes one row of each table. Nothing is allocated, traced,
compiled or captured again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, Self

import torch
from torch import nn

from ..arguments import check_flag
from ..edits.kinds import Edit
from ..edits.stack import Stack
from ..hints import Folder, Layers, Site
from ..patching.handle import Handle
from ..patching.model_edits import Root, mark_first, root_of
from ..patching.under_way import MAKING, leave
from .assignment import Assigned, Assignment, Served, by_token, check_name, dialled, flat_names
from .entries import Entry, forms_of, places_of
from .residency import BankFullError, Books, Stats
from .tables import Tables

__all__ = ["Bank", "BankFullError", "Stats"]


class Bank:
    """Edits of one model by name; see the top of this file. As a context manager it closes the bank on exit.

    Args:
        model: as for `fastedit.patch`. It may have other handles and banks.
        capacity: how many edits are resident on the device at once. More may be added; the least recently used ones
            then wait in host memory.
        sites, layers: where edits may act (layers as in `Edit(layers=)`). Tables are allocated there, with
            capacity × (2 + 2 · rank) · width numbers each.
        rank: the largest rank of the low-rank part at one site. 0 for RED, steering and other edits by scale and bias.
        positions: whether edits may have positions other than "all". Every forward is then looked at
            (patching/rows/row_plan.py).
        gates: whether edits may be behind a gate: one per site of a layer, dot or cosine, decided by token on what the
            edit is given. This adds capacity × (width + 3) numbers at each place, which every forward reads.
        host: how many bytes of edits host memory keeps. None for no limit. Beyond it the least recently used ones are
            written to `folder`, which is then required.
        fused: False keeps to the plain path.
        unassigned: what happens to a forward from a thread or task without an assignment while another one has one.
            "refuse": it is refused. "warn": it runs unedited with a warning (a compiled forward is refused all the
            same).

    Raises:
        TypeError, ValueError: something that cannot be served, before anything on the model has changed.
    """

    freeze = False  # what a Root asks of a Handle

    def __init__(
        self, model: nn.Module, capacity: int, *, sites: Sequence[Site] = ("mlp",), rank: int = 0, layers: Layers = None,
        positions: bool = False, gates: bool = False, host: int | None = None, folder: Folder | None = None,
        fused: bool = True, unassigned: Literal["refuse", "warn"] = "refuse",
    ) -> None:  # fmt: skip
        Tables.check(capacity, rank)
        for said, value in (("positions", positions), ("gates", gates), ("fused", fused)):
            check_flag(said, value)
        if unassigned not in ("refuse", "warn"):
            raise ValueError(f"unassigned is {unassigned!r}, expected 'refuse' or 'warn'")
        with MAKING:
            self._make(model, capacity, sites, rank, layers, positions, gates, host, folder, fused, unassigned)

    def _make(self, model, capacity, sites, rank, layers, positions, gates, host, folder, fused, unassigned):
        root = root_of(model) or Root(model)
        found, devices = places_of(root.layers, sites, layers)
        root.check((layer, site, width, True, gates) for layer, site, width in found)
        self.tables = Tables([(layer.name, site, width) for layer, site, width in found], capacity, rank, devices, gates)
        self._books = Books(self.tables, host, folder)
        if fused:
            root.prove([(layer, site) for layer, site, _ in found])
        self.model, self.capacity, self.positions = model, capacity, bool(positions)
        self.closed, self.name, self._root = False, root.new_name("bank"), root
        self._assigned = Assigned(unassigned)
        self._served = [
            (layer, Served(self.tables, layer.name, site, self._assigned, self.positions, fused)) for layer, site, _ in found
        ]
        mark_first(self._served)
        with root.changing(model, "a new Bank"):
            self._install()

    # --- the edits ------------------------------------------------------------------------------------------

    def add(self, name: str, edits: Edit | Sequence[Edit] | Handle | Folder) -> None:
        """Hold an edit under a name. It is resident at once if a slot is free or an idle edit can be evicted.

        Args:
            name: a string, not in use.
            edits: an Edit or a list of them (a stack), a Handle, or what `fastedit.load` takes. Its strengths are
                folded in, and a copy is made: later changes to it have no effect here.

        Raises:
            TypeError, ValueError, EditFileError: a name in use, or an edit that this bank cannot hold (another site,
                too high a rank, gates of other kinds or beside another edit, probes, keep_norm, several positions),
                with the reason.
        """
        self._alive()
        self._books.check_new(check_name(name))
        self._books.add(self._entry_of(name, edits))

    def replace(self, name: str, edits: Edit | Sequence[Edit] | Handle | Folder) -> None:
        """Hold another edit under a name. Assignments in force keep the old one; later assignments have the new one.

        Args:
            name: one that is held. edits: as `add`.

        Raises:
            KeyError: no such name. Others as `add`, and BankFullError for a pinned edit that is in use while no other
                slot can be had. The old edit is then still there.
        """
        self._entry(name)
        self._books.replace(self._entry_of(name, edits))

    def remove(self, name: str) -> None:
        """Forget a name. An assignment in force keeps the edit until it ends; its slot is not reused before.

        Raises:
            KeyError: no such name.
        """
        self._entry(name)
        self._books.remove(name)

    def pin(self, name: str) -> None:
        """Make an edit resident, and keep it so until `unpin` or `remove`.

        Raises:
            KeyError, BankFullError: no such name, no slot for it.
        """
        self._entry(name)
        self._books.pin(name)

    def unpin(self, name: str) -> None:
        """Allow the edit of a name to be evicted again. KeyError: no such name."""
        self._entry(name).pinned = False

    def prefetch(self, names: Iterable[str | Stack]) -> None:
        """Make edits, and stacks of them, resident before they are assigned. Any thread may call this while others run
        the model.

        Args:
            names: names, and fastedit.Stack of them.

        Raises:
            KeyError, BankFullError: as `assign`.
        """
        self._alive()
        wanted = {name if type(name) is Stack else check_name(name) for name in names}
        self._books.release(self._books.acquire(wanted).values())

    def __contains__(self, name: object) -> bool:
        return name in self._books.entries

    def __len__(self) -> int:
        return len(self._books.entries)

    @property
    def names(self) -> list[str]:
        """The names held, least recently used first."""
        with self._books.lock:
            return list(self._books.entries)

    @property
    def resident(self) -> list[str]:
        """Names whose edits are on the device, least recently used first. `stats` counts stacks in slots."""
        with self._books.lock:
            return [entry.name for entry in self._books.resident.values() if not entry.gone and not entry.parts]

    def stats(self) -> Stats:
        """Stats, all of one moment."""
        self._alive()
        self._assigned.settle(self._books)
        return self._books.stats()

    # --- who is edited by what ------------------------------------------------------------------------------

    def assign(
        self, names: Sequence[str | Stack | None] | Sequence[Sequence[str | Stack | None]],
        strengths: float | Sequence[float | Sequence[float]] | None = None, *, tokens: torch.Tensor | None = None,
    ) -> Assignment:  # fmt: skip
        """A context in which names[i] edits sequence i of a batch. None: not edited.

        It holds for this context (contextvars): for this thread or asyncio task, for tasks started in it, and for
        asyncio.to_thread. It does not hold for a thread started by hand. A layer that `gradient_checkpointing_enable`
        computes again in the backward has the assignment of its forward, wherever the backward runs.

        Args:
            names: one per sequence (in `generate`, beams and samples of a sequence share its name). For packed
                sequences a list of names per sequence, one per token. `Stack("a", "b")` in place of a name: those
                edits, in this order.
            strengths: one number, or one for each name: h + strength · (edited − h). 1 by default. For a Stack a number
                dials the whole, a list of numbers its parts.
            tokens: for packed sequences instead of nested lists: integers (batch, tokens), the index in `names` of each
                token's edit. −1: untouched.

        Names that are not resident are loaded when the context is entered. They replace the least recently used ones
        that are neither pinned nor in use.

        Raises:
            KeyError: a name that the bank does not hold. TypeError, ValueError: names and strengths that do not fit, or
                a stack whose ranks add up to more than the bank's, or whose parts have different positions.
            BankFullError: on entering, more different names than there are slots for.
        """
        self._alive()
        names, shape = flat_names(names)
        names, factors = dialled(names, strengths)
        if tokens is not None:
            names, factors, shape = by_token(names, factors, shape, tokens)
        for name in {*names} - {None}:
            self._books.wanted(name)
        return Assignment(self, names, factors, shape)

    @property
    def device(self) -> torch.device:
        """The device of the assignments: that of the first table."""
        return next(self.tables.buffers()).device

    # --- the end --------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give the model back bit for bit, and free the memory. A second call does nothing.

        Raises:
            RuntimeError: an assignment is in force, or a forward of the model is under way in another thread.
        """
        self._leave()

    def _leave(self, patience=None):
        with self._root.turn:
            if self.closed:
                return
            with self._root.changing(self.model, "close", patience=patience), self._books.writing, self._books.lock:
                if self._assigned.entered:
                    raise RuntimeError("an assignment of this bank is in force: leave it before close()")
                self._root.change(self.model, self._stacks(lambda there, served: [m for m in there if m is not served]))
                self._root.drop(self.model, self.name)
                self._books.clear()
                self.closed = True
            self.tables, self._books.tables, self._served = None, None, []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        leave(self._leave, kind)

    def __repr__(self):
        if self.closed:
            return f"<fastedit bank {self.name}: closed>"
        resident = len(self._books.resident)
        return f"<fastedit bank {self.name}: {len(self)} edits, {resident} of {self.capacity} slots, {self.tables.extra_repr()}>"

    # --- how: the model -------------------------------------------------------------------------------------

    def _install(self):
        root, model = self._root, self.model
        root.put(model)
        root.handles[self.name] = self
        root.add_module(self.name, self.tables)
        try:
            root.change(model, self._stacks(lambda there, served: [*there, served]))
        except BaseException:
            root.change(model, self._stacks(lambda there, served: [m for m in there if m is not served]))
            root.drop(model, self.name)
            raise

    def _stacks(self, change):
        return {
            (layer, served.place[1]): change(self._root.stack(layer, served.place[1]), served)
            for layer, served in self._served
        }

    def _alive(self):
        if self.closed:
            raise RuntimeError("this bank was closed; make another one")

    def _entry(self, name):
        self._alive()
        return self._books.entry(check_name(name))

    def _entry_of(self, name, edits):
        forms, gates, positions = forms_of(edits, self.model, self._root.layers, self.positions)
        ranks = {place: form.rank for place, form in forms.items()}
        return Entry(name, self.tables.stage(forms, gates), positions, ranks, gates)


def banks(model: nn.Module) -> list[Bank]:
    """The banks on a model, in the order in which they were made. A copied model has banks of its own."""
    root = root_of(model)
    return [] if root is None else [bank for bank in root.handles.values() if isinstance(bank, Bank)]
