"""The books of a bank: which name has which edit, where each is kept, and who uses it.

Books know tables and no model. There are two locks. `lock` guards the books and is held for moments. `writing` is held
by whoever fills a slot. So a forward whose edits are resident waits for nobody.
"""

import threading
from collections import OrderedDict
from typing import NamedTuple

import torch

from ..edits.stack import Stack, stacked
from .entries import Combination, Spill


class BankFullError(RuntimeError):
    """Every slot is pinned or in use by an assignment in force. Nothing has changed."""


class Stats(NamedTuple):
    """A bank's counts. entries: names. resident, pinned, in_use: how many of them. on_host, on_disk: copies kept there.

    hits, loads: names and stacks that an assignment or prefetch found resident, or had to load. Bytes: of the tables on
    the device, whether full or not, and of the host copies. stacks: those in slots of their own, beside `resident`.
    """

    capacity: int
    entries: int
    resident: int
    pinned: int
    in_use: int
    on_host: int
    on_disk: int
    hits: int
    loads: int
    evictions: int
    device_bytes: int
    host_bytes: int
    stacks: int


class Books:
    """Entries by name over `tables`. `host` bytes of copies stay in memory (None: no limit), the rest goes to `folder`.

    entries: name → Entry. resident: id → Entry, of those with a slot. Both have the least recently used first.
    combinations: key → Combination, of stacks that have a slot or are about to.
    """

    def __init__(self, tables, host=None, folder=None):
        _check_host(host, folder)
        self.tables, self.host = tables, host
        self.spill = None if folder is None else Spill(folder)
        self.entries, self.resident, self.combinations = OrderedDict(), OrderedDict(), {}
        self.host_bytes = self.hits = self.loads = self.evictions = 0
        self.read = {}  # slot → events after which nobody reads it any more; on a GPU
        self._make_locks()

    def _make_locks(self):
        self.lock, self.writing, self._spilling = threading.RLock(), threading.Lock(), threading.Lock()

    def __getstate__(self):
        """For a copy of the model, whose bank has every edit in memory and no assignment in force."""
        with self.writing, self.lock:
            for entry in [*self.entries.values(), *self.resident.values()]:
                if entry.staged is None and not entry.parts:
                    entry.staged = self.tables.staged_from(self.spill.read(entry.path))
                    self.host_bytes += entry.nbytes
            state = {k: v for k, v in self.__dict__.items() if k not in ("lock", "writing", "_spilling")}
            return state | {"read": {}, "combinations": {}}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._make_locks()
        self.resident = OrderedDict((id(entry), entry) for entry in self.resident.values())
        for entry in [*self.entries.values(), *self.resident.values()]:
            entry.uses, entry.folding, entry.path, entry.ready = 0, 0, None, None
        for entry in [entry for entry in self.resident.values() if entry.gone or entry.parts]:
            self._retire(entry)

    # --- names ----------------------------------------------------------------------------------------------

    def check_new(self, name):
        if name in self.entries:
            raise ValueError(f"the bank holds an edit named {name!r} already: replace() it, or remove() it first")

    def entry(self, name):
        entry = self.entries.get(name)
        if entry is None:
            some = ", ".join(repr(n) for n in list(self.entries)[:5]) or "none yet"
            raise KeyError(f"the bank holds no edit named {name!r}; it holds {len(self.entries)}: {some}")
        return entry

    def wanted(self, name):
        """The present Entry of a name, or Combination of a Stack. It may be new and without a slot.

        Raises:
            KeyError: no such name. ValueError: a stack whose parts cannot be one.
        """
        if type(name) is not Stack:
            return self.entry(name)
        with self.lock:
            parts = tuple(self.entry(part) for part in name.names)
            key = tuple(map(id, parts)), name.strengths
            return self.combinations.get(key) or Combination(name, parts, key, self.tables.rank)

    def add(self, entry):
        with self.lock:
            self.check_new(entry.name)
            self.entries[entry.name] = entry
            self.host_bytes += entry.nbytes
        try:
            self._load(entry, must=False)
            self._trim()
        except BaseException:  # a full disk, say: what is refused leaves no name
            with self.lock:
                if self.entries.get(entry.name) is entry:
                    del self.entries[entry.name]
                self._retire(entry)
            raise

    def replace(self, entry):
        name = entry.name
        self._trim(coming=entry.nbytes)  # a disk that is full is found before the old edit is let go
        if self.host is not None and self.host_bytes + entry.nbytes > self.host:
            entry.path = self.spill.write(entry.staged)
        with self.writing:
            slot = self._room()
            if slot is not None:
                self._write(slot, entry, entry.staged)
            with self.lock:
                old = self.entries.get(name)
                full = old is not None and slot is None and old.pinned and old.uses > 0
                if old is not None and not full:
                    self._switch(old, entry, slot)
                elif slot is not None:
                    self.tables.give(slot)
        if (old is None or full) and entry.path is not None:
            self.spill.forget(entry.path)
        if old is None:
            self.entry(name)
        if full:
            raise BankFullError(f"{name!r} is pinned and in use, and there is no other slot for its replacement")
        self._load(entry, must=False)
        self._trim()

    def _switch(self, old, new, slot):
        """Replace one name's entry by another, under both locks."""
        new.pinned, self.entries[new.name] = old.pinned, new
        self.host_bytes += new.nbytes
        self._retire(old)
        if slot is not None:
            self._publish(new, slot)

    def remove(self, name):
        with self.lock:
            entry = self.entry(name)
            del self.entries[name]
            self._retire(entry)

    def clear(self):
        with self.lock:
            for name in list(self.entries):
                self.remove(name)

    def pin(self, name):
        with self.lock:
            entry = self.entry(name)
            before, entry.pinned = entry.pinned, True
        try:
            self.release(self.acquire({name}).values())
        except BaseException:
            entry.pinned = before
            raise

    def stats(self):
        with self.lock:
            entries = list(self.entries.values())
            return Stats(
                self.tables.capacity, len(entries), sum(e.slot is not None for e in entries),
                sum(e.pinned for e in entries), sum(e.uses > 0 for e in entries),
                sum(e.staged is not None for e in entries), sum(e.path is not None for e in entries), self.hits,
                self.loads, self.evictions, sum(table.nbytes for table in self.tables.buffers()), self.host_bytes,
                sum(e.slot is not None for e in self.combinations.values()),
            )  # fmt: skip

    # --- in use ---------------------------------------------------------------------------------------------

    def acquire(self, names):
        """{name or Stack: Entry}, each of them resident until `release`."""
        if len(names) > self.tables.capacity:
            raise BankFullError(
                f"{len(names)} different edits in one batch, and the bank has a capacity of {self.tables.capacity}: cut the "
                "batch, or make a bank of that capacity"
            )
        with self.lock:
            held = {name: self.wanted(name) for name in names}
            for entry in held.values():
                self._use(entry)
            missing = [entry for entry in held.values() if entry.slot is None]
            parts = [part for entry in missing for part in entry.parts]
            for part in parts:
                part.folding += 1
        try:
            for entry in missing:
                self._load(entry)
            self._wait_for(held.values())
            if missing:
                self._trim()
        except BaseException:
            self.release(held.values())
            raise
        finally:
            self._folded(parts)
        return held

    def _use(self, entry):
        entry.uses += 1
        if entry.parts:
            self.combinations[entry.key] = entry
        for part in entry.parts or (entry,):
            self.entries.move_to_end(part.name)
        if entry.slot is not None:
            self.resident.move_to_end(id(entry))
            self.hits += 1

    def _folded(self, parts):
        """Host copies that a stack was made of are no longer needed for that."""
        with self.lock:
            for part in parts:
                part.folding -= 1
                if part.gone:
                    self._retire(part)

    def release(self, entries):
        entries = list(entries)
        self._note_reads(entries)
        with self.lock:
            for entry in entries:
                entry.uses -= 1
                if entry.gone or (entry.parts and entry.slot is None):
                    self._retire(entry)

    def _retire(self, entry):
        """Retire an entry that no name leads to any more. Its slot and copies end with its last use. Under the lock."""
        entry.gone = True
        for combination in [c for c in self.combinations.values() if c is entry or entry in c.parts]:
            del self.combinations[combination.key]
            if combination is not entry:
                self._retire(combination)
        if entry.uses or entry.folding:
            return
        if entry.slot is not None:
            self.tables.give(entry.slot)
            del self.resident[id(entry)]
            entry.slot = None
        self._drop_host(entry)
        if entry.path is not None:
            self.spill.forget(entry.path)
            entry.path = None

    def _drop_host(self, entry):
        if entry.staged is not None:
            self.host_bytes -= entry.nbytes
            entry.staged = None

    def _publish(self, entry, slot):
        entry.slot, self.resident[id(entry)] = slot, entry

    # --- slots ----------------------------------------------------------------------------------------------

    def _load(self, entry, must=True):
        """Make an entry resident. Without `must`, it stays where it is if there is no room."""
        with self.writing:
            with self.lock:
                staged = entry.staged
                if entry.slot is not None or (entry.gone and not entry.uses):
                    return
            slot = self._room()
            if slot is None:
                if must:
                    raise BankFullError(
                        f"no slot for {entry.name!r}: all {self.tables.capacity} are pinned, or in use by assignments in force"
                    )
                return
            try:
                self._write(slot, entry, self._read(entry) if staged is None else staged)
            except BaseException:
                with self.lock:
                    self.tables.give(slot)
                    if entry.gone and not entry.uses:  # removed, and its file with it, while it was read
                        return
                raise
            with self.lock:
                self.loads += must
                if entry.gone and not entry.uses:  # removed while it was written
                    self.tables.give(slot)
                else:
                    self._publish(entry, slot)

    def _read(self, entry):
        """The Staged of an entry without a host copy, from its file; or of a stack, folded from its parts."""
        if not entry.parts:
            return self.tables.staged_from(self.spill.read(entry.path))
        parts, gates = [], {}
        for part in entry.parts:
            staged = part.staged  # None only once its file is there
            staged = self._read(part) if staged is None else staged
            parts.append({place: [form] for place, form in self.tables.forms(staged, part.ranks).items()})
            gates |= self.tables.staged_gates(staged, part.gated)
        return self.tables.stage(stacked(parts, entry.strengths), gates)

    def _room(self):
        """A slot to write to: a free one, or that of the least recently used edit. None if there is none."""
        with self.lock:
            slot = self.tables.take()
            if slot is not None:
                return slot
            idle = next((e for e in self.resident.values() if not e.uses and not e.pinned), None)
            if idle is None:
                return None
            del self.resident[id(idle)]
            slot, idle.slot = idle.slot, None
            if idle.parts:
                del self.combinations[idle.key]
            self.evictions += 1
            return slot

    def _write(self, slot, entry, staged):
        for event in self.read.pop(slot, ()):
            event.wait()
        self.tables.write(slot, staged)
        entry.ready = self._events()

    def _wait_for(self, entries):
        for entry in entries:
            for event in entry.ready or ():
                event.wait()

    def _note_reads(self, entries):
        events = self._events()
        if events:
            self.read.update((entry.slot, events) for entry in entries if entry.slot is not None)

    def _events(self):
        """Events of this thread's streams so far, on each GPU that holds tables, for other streams to wait on."""
        devices = [device for device in self.tables.devices() if device.type == "cuda"]
        return [torch.cuda.current_stream(device).record_event() for device in devices]

    def _trim(self, coming=0):
        """Move the least recently used edits beyond `host` bytes, `coming` bytes included, to files."""
        if self.host is None or self.host_bytes + coming <= self.host:
            return
        with self._spilling:
            while True:
                with self.lock:
                    entry = next((e for e in self.entries.values() if e.staged is not None), None)
                    if self.host_bytes + coming <= self.host or entry is None:
                        return
                    if entry.path is not None:
                        self._drop_host(entry)
                        continue
                    staged = entry.staged
                path = self.spill.write(staged)
                with self.lock:
                    if entry.gone and not entry.uses:
                        self.spill.forget(path)
                    else:
                        entry.path = path
                        self._drop_host(entry)


def _check_host(host, folder):
    if host is None:
        return
    if isinstance(host, bool) or not isinstance(host, int) or host < 0:
        raise ValueError(f"host is {host!r}, expected a number of bytes, or None for no limit")
    if folder is None:
        raise ValueError("host limits what memory keeps: give folder=, where the rest goes")
