"""Many edits resident at once, a name each, mixed in one batch at the price of one (DESIGN.md 1, bank).

    bank = fastedit.Bank(model, capacity=256)
    bank.add("anna", "my-edit");  bank.add("ben", fastedit.Steer(directions))
    with bank.assign(["anna", None, "ben"]):          # one name a sequence; None = untouched
        model.generate(**batch_of_three)

Tables are allocated once (bank_tables.py); adding an edit writes one row of each, so nothing is allocated, traced,
compiled or captured again.
"""

from .arguments import check_flag
from .bank_books import BankFullError, Books, Stats
from .bank_entries import Entry, forms_of, places_of
from .bank_rows import Assigned, Assignment, Served, by_token, check_name, dialled, flat_names
from .bank_tables import Tables
from .root import Root, mark_first, root_of
from .stacks import Stack

__all__ = ["Bank", "BankFullError", "Stats"]


class Bank:
    """Edits of one model by name; see the top of this file. Also a context manager: leaving it closes the bank.

    Args:
        model: as for `fastedit.patch`; other handles and banks may be on it.
        capacity: how many edits are resident on the device at once; more may be added, the least recently used ones
            then wait in host memory.
        sites: the sites that its edits may act at, and layers the layers (as `Edit(layers=)`): there tables are
            allocated, capacity × (2 + 2 · rank) · width numbers each.
        rank: of the low-rank part at one site, at most; 0 for RED, steering and other edits by scale and bias.
        positions: whether edits may have positions other than "all"; then every forward is looked at (row_plan.py).
        gates: whether an edit may be behind a gate, one a site of a layer: dot or cosine, decided by token on what the
            edit is given. Then capacity × (width + 3) more numbers at each place, which every forward looks at.
        host: how many bytes of edits host memory keeps; None for no limit. Beyond it the least recently used ones are
            written to `folder`, which then is needed.
        fused: False keeps to the plain path.
        unassigned: what becomes of a forward from a thread or task without an assignment while another one has one: it is
            refused ("refuse"), or runs unedited with a warning ("warn"; a compiled forward is refused all the same).

    Raises:
        TypeError, ValueError: what cannot be served, before anything on the model has changed.
    """

    freeze = False  # what a Root asks of a Handle

    def __init__(
        self, model, capacity, *, sites=("mlp",), rank=0, layers=None, positions=False, gates=False, host=None, folder=None,
        fused=True, unassigned="refuse",
    ):  # fmt: skip
        Tables.check(capacity, rank)
        for said, value in (("positions", positions), ("gates", gates), ("fused", fused)):
            check_flag(said, value)
        if unassigned not in ("refuse", "warn"):
            raise ValueError(f"unassigned is {unassigned!r}, expected 'refuse' or 'warn'")
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
        self._install()

    # --- the edits ------------------------------------------------------------------------------------------

    def add(self, name, edits):
        """Hold an edit under a name; resident at once where a slot is free or an idle edit can be evicted.

        Args:
            name: a string, not in use.
            edits: an Edit or a list of them (a stack), a Handle, or what `fastedit.load` takes. Its strengths are
                folded in, and a copy is made: nothing that happens to it later is seen.

        Raises:
            TypeError, ValueError, EditFileError: a name in use, or an edit that this bank cannot hold (another site, too
                high a rank, gates of other kinds or beside another edit, probes, keep_norm, several positions), and why.
        """
        self._alive()
        self._books.check_new(check_name(name))
        self._books.add(self._entry_of(name, edits))

    def replace(self, name, edits):
        """Hold another edit under a name. Assignments in force keep the one before; those made later have the new one.

        Raises:
            KeyError: no such name. Others as `add`, and BankFullError for a pinned edit that is in use while no other
                slot can be had; the edit before is then still there.
        """
        self._entry(name)
        self._books.replace(self._entry_of(name, edits))

    def remove(self, name):
        """Forget a name. An assignment in force keeps the edit until it ends; its slot is not given away before.

        Raises:
            KeyError: no such name.
        """
        self._entry(name)
        self._books.remove(name)

    def pin(self, name):
        """Make an edit resident, and keep it so until `unpin` or `remove`.

        Raises:
            KeyError, BankFullError: no such name, no slot for it.
        """
        self._entry(name)
        self._books.pin(name)

    def unpin(self, name):
        """Let an edit be evicted again."""
        self._entry(name).pinned = False

    def prefetch(self, names):
        """Make edits, and stacks of them, resident before they are assigned; from any thread, while others run the model.

        Raises:
            KeyError, BankFullError: as `assign`.
        """
        self._alive()
        wanted = {name if type(name) is Stack else check_name(name) for name in names}
        self._books.release(self._books.acquire(wanted).values())

    def __contains__(self, name):
        return name in self._books.entries

    def __len__(self):
        return len(self._books.entries)

    @property
    def names(self):
        """The names held, least recently used first."""
        with self._books.lock:
            return list(self._books.entries)

    @property
    def resident(self):
        """Names whose edits are on the device, least recently used first. Stacks in slots are counted by `stats`."""
        with self._books.lock:
            return [entry.name for entry in self._books.resident.values() if not entry.gone and not entry.parts]

    def stats(self):
        """Stats, all of one moment."""
        self._alive()
        self._assigned.settle(self._books)
        return self._books.stats()

    # --- who is edited by what ------------------------------------------------------------------------------

    def assign(self, names, strengths=None, *, tokens=None):
        """A context inside which forwards edit sequence i of a batch by names[i]; None: not at all.

        It holds for this context (contextvars): for this thread, or asyncio task, for tasks started in it and for
        asyncio.to_thread, not for a thread started by hand. A layer that `gradient_checkpointing_enable` computes again in
        the backward has the assignment of its forward, wherever the backward runs.

        Args:
            names: one a sequence (in `generate`, beams and samples of a sequence share its name), or for packed sequences a
                list of names a sequence, one a token. In the place of a name, `Stack("a", "b")`: those edits, in this order.
            strengths: a number, or one for each name: h + strength · (edited − h). 1 by default. For a Stack a number
                dials the whole, a list of numbers its parts.
            tokens: for packed sequences instead of nested lists: integers (batch, tokens), which of `names` a token is
                of; −1: untouched.

        Names that are not resident are brought in when the context is entered, in place of the least recently used ones
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
    def device(self):
        """Where assignments are kept: that of the first table."""
        return next(self.tables.buffers()).device

    # --- the end --------------------------------------------------------------------------------------------

    def close(self):
        """Give the model back bit for bit, and the memory. Doing it again does nothing.

        Raises:
            RuntimeError: an assignment is in force.
        """
        if self.closed:
            return
        with self._books.writing, self._books.lock:
            if self._assigned.entered:
                raise RuntimeError("an assignment of this bank is in force: leave it before close()")
            self._root.change(self.model, self._stacks(lambda there, served: [m for m in there if m is not served]))
            self._root.drop(self.model, self.name)
            self._books.clear()
            self.closed = True
        self.tables, self._books.tables, self._served = None, None, []

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def __repr__(self):
        if self.closed:
            return f"<fastedit bank {self.name}: closed>"
        resident = len(self._books.resident)
        return f"<fastedit bank {self.name}: {len(self)} edits, {resident} of {self.capacity} slots, {self.tables.extra_repr()}>"

    # --- how: the model -------------------------------------------------------------------------------------

    def _install(self):
        root, model = self._root, self.model
        model._modules["fastedit"] = root
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


def banks(model):
    """The banks on a model, in the order they were made; a copied model has banks of its own."""
    root = root_of(model)
    return [] if root is None else [bank for bank in root.handles.values() if isinstance(bank, Bank)]
