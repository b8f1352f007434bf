"""Which edits are in the tables: loaded when a batch first needs them; the longest unused one makes room."""

import functools
from collections import Counter, OrderedDict
from pathlib import Path

from ..edits.stack import stacked
from .contents import EditFileError, read_contents

_KEPT_ON_HOST = 1024  # files read before; a fine-tuned edit of a 7B model has 1 MB


class Shelf:
    """The workers' side of the staged copies: digests to Contents."""

    def __init__(self, options):
        staging, width, depth = Path(options["staging"]), options["width"], options["depth"]
        self.contents = functools.lru_cache(_KEPT_ON_HOST)(lambda digest: _read(staging, digest, width, depth))

    def key(self, plan):
        """(what must be in a slot for this plan, the strength of its rows, positions)."""
        contents = [self.contents(digest) for digest, _ in plan]
        if len(plan) == 1 and contents[0].linear:
            return ((plan[0][0], 1.0),), plan[0][1], contents[0].positions
        return tuple(map(tuple, plan)), 1.0, contents[0].positions

    def forms(self, key):
        """({(layer number, site): Form}, {such a place: (gate, rule)}) of a key."""
        contents = [self.contents(digest) for digest, _ in key]
        gates = {place: gate for one in contents for place, gate in one.gates.items()}
        return stacked([one.parts for one in contents], [strength for _, strength in key]), gates


def _read(staging, digest, width, depth):
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise EditFileError(f"{digest!r:.80} is not the digest of an edit")
    contents = read_contents(staging / digest, width, depth)
    if contents.digest != digest:
        raise EditFileError(f"{staging / digest} holds another edit ({contents.digest[:16]}…): it was changed by hand")
    return contents


class Residency:
    """Slots of the tables, each for one key, held by the rows of the present batch.

    There are as many slots as a batch can have rows. So one that nobody holds always exists.
    """

    def __init__(self, tables, shelf):
        self.tables, self.shelf = tables, shelf
        self.slots = OrderedDict()  # key → slot, the longest unused first
        self.holders = Counter()
        self.free = list(range(tables.capacity))[::-1]
        self.loads = 0

    def hold(self, key):
        """The key's slot, for one more row."""
        slot = self.slots.get(key)
        if slot is None:
            staged = self.tables.stage(*self.shelf.forms(key))
            slot = self.free.pop() if self.free else self._evict()
            try:
                self.tables.write(slot, staged)
            except BaseException:
                self.free.append(slot)
                raise
            self.slots[key] = slot
            self.loads += 1
        self.slots.move_to_end(key)
        self.holders[key] += 1
        return slot

    def drop(self, key):
        """One row less."""
        self.holders[key] -= 1
        if not self.holders[key]:
            del self.holders[key]

    def _evict(self):
        key = next(key for key in self.slots if key not in self.holders)
        return self.slots.pop(key)
