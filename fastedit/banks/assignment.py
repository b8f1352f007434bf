"""Which rows of a forward get whose edit: a bank's assignments, and the stage that reads its tables.

An assignment belongs to the context that entered it (patching/rows/in_force.py). Forwards of other threads and tasks do
not see it. Its slots and strengths are spread over the rows once, for all layers and steps of a shape.
"""

import weakref
from collections import deque

import torch

from ..arguments import as_list
from ..edits.stack import Stack, finite
from ..kernels.reference.form import gated_coefficient
from ..patching.rows.in_force import Entered, Owner, check_batch, spread
from ..patching.rows.tenants import Slotted
from ..patching.site import Stage


class Assigned(Owner):
    """The assignments in force at a bank."""

    def __setstate__(self, state):
        super().__setstate__(state)
        self.spare = {}  # (shape, device) → [(slots, factors)] not in use: a captured graph holds their addresses
        self.over = deque()  # entries whose last forward will not be computed again

    def __getstate__(self):
        return {name: value for name, value in super().__getstate__().items() if name not in ("spare", "over")}

    def slot(self, hidden):
        """int32, one per row of hidden (…, width)."""
        return self.now().slot(hidden)

    def buffers(self, shape, device):
        """(slots int32, factors fp32) of `shape`, those of an earlier assignment if there are any."""
        spare = self.spare.get((shape, device))
        if spare:
            return spare.pop()
        with torch.inference_mode(False):
            return torch.empty(shape, dtype=torch.int32, device=device), torch.empty(shape, device=device)

    def give_back(self, shape, device, pair):
        self.spare.setdefault((shape, device), []).append(pair)

    def settle(self, books):
        """Free the slots of assignments that a checkpoint still held. Not during garbage collection, which may run
        under any lock."""
        while self.over:
            books.release(self.over.popleft())


class Assignment:
    """A context in which names[i] edits sequence i of a batch (or token i of a packed one)."""

    def __init__(self, bank, names, strengths, shape):
        self.bank, self.names, self.strengths, self.shape = bank, names, strengths, shape
        self.entered = None

    @property
    def slots(self):
        """int32, shaped like the names. Only inside the assignment."""
        return self.entered.slots

    def __enter__(self):
        if self.entered is not None:
            raise RuntimeError("this assignment is in force already; ask bank.assign for another one")
        bank = self.bank
        bank._assigned.settle(bank._books)
        held = bank._books.acquire({name for name in self.names if name is not None})
        try:
            entered = EnteredNames(self, held)
            bank._assigned.push(entered)
        except BaseException:
            bank._books.release(held.values())
            raise
        self.entered, self.held = entered, held
        return self

    def __exit__(self, *exception):
        (entered, self.entered), (held, self.held) = (self.entered, None), (self.held, None)
        assigned, books = self.bank._assigned, self.bank._books
        assigned.pop(entered)
        if entered.carried:  # a checkpoint may come back to it: its slots are nobody else's until that is forgotten
            weakref.finalize(entered, assigned.over.append, list(held.values())).atexit = False
            return
        assigned.give_back(self.shape, entered.device, entered.pair)
        books.release(held.values())
        entered.clear()


class EnteredNames(Entered):
    """An assignment while it is in force: the rows' slots, strengths and positions on the device."""

    def __init__(self, assignment, held):
        super().__init__()
        bank, names, strengths, shape = assignment.bank, assignment.names, assignment.strengths, assignment.shape
        places = [-1 if name is None else held[name].slot for name in names]
        kinds = [None if name is None else held[name].positions for name in names]
        self.positions = list(dict.fromkeys(k for name, k in zip(names, kinds, strict=True) if name is not None))
        self.idle = all(place < 0 for place in places)
        self.plain = all(factor == 1.0 for factor in strengths) and self.positions in ([], [None])
        self.device = bank.device
        self.pair = self.slots, self.factors = bank._assigned.buffers(shape, self.device)
        with torch.inference_mode(False), torch.no_grad():
            self.slots.copy_(torch.tensor(places, dtype=torch.int32).view(shape))
            self.factors.copy_(torch.tensor(strengths).view(shape))
            self.which = None
            if self.positions not in ([], [None]):
                numbers = [self.positions.index(k) if k in self.positions else 0 for k in kinds]
                self.which = torch.tensor(numbers, dtype=torch.int32, device=self.device).view(shape)
        self.kept = {}

    def clear(self):
        self.pair = self.slots = self.factors = self.which = None
        self.kept = {}

    def slot(self, hidden):
        return self._spread("slots", self.slots, hidden)

    def coefficient(self, hidden, stack):
        """fp32, one per row of hidden (…, width). None for 1 throughout."""
        compiling = torch.compiler.is_compiling()
        if not compiling and self.plain:
            return None
        factors = self._spread("factors", self.factors, hidden)
        if self.which is None:
            return factors
        plan = stack.known_plan("an edit of a bank with positions")
        key = self, hidden.shape[:-1], hidden.device
        if compiling or key not in plan.measured:
            plan.measured[key] = factors * self._placed(hidden, stack)
        return plan.measured[key]

    def _placed(self, hidden, stack):
        """1 where a row's own edit acts, 0 elsewhere (or a share, where a mask gives one)."""
        which = self._spread("which", self.which, hidden)
        total = torch.zeros(hidden.shape[:-1], device=hidden.device)
        for number, positions in enumerate(self.positions):
            here = None if positions is None else stack.coefficient(positions, hidden.shape, hidden.device)
            total = torch.where(which == number, 1.0 if here is None else here, total)
        return total

    def _spread(self, name, rows, hidden):
        if rows.dim() == 1:
            check_batch(hidden, len(rows), "names")
        if torch.compiler.is_compiling() or (hidden.is_cuda and torch.cuda.is_current_stream_capturing()):
            return self._over(rows, hidden)  # a graph reads the assignment that is in force when it is replayed
        key = name, hidden.shape[:-1], hidden.device
        found = self.kept.get(key)
        if found is None:
            with torch.inference_mode(False):
                found = self.kept[key] = self._over(rows, hidden)
        return found

    def _over(self, rows, hidden):
        if rows.dim() == 1:
            return spread(rows, hidden)
        if rows.numel() != hidden.shape[:-1].numel() or rows.shape[0] != hidden.shape[0] != rows.numel():
            raise ValueError(
                f"assign() was given one name per token for {tuple(rows.shape)} (batch, tokens), but the hidden states have "
                f"shape {tuple(hidden.shape)}: packed sequences run in one forward, without a cache of earlier ones; "
                f"{_STACKS}"
            )
        return rows.to(hidden.device, copy=True).reshape(hidden.shape[:-1])  # a backward may save it


class Served:
    """Takes the place of an edit's masters at a site: the tables there."""

    is_sensor = is_probe = trainable = keep_norm = dialled = False
    positions = gating = None
    direct = alone = True
    first = False  # of the places that a forward comes to

    def __init__(self, tables, layer, site, assigned, needs_plan, fused):
        self.tables, self.place, self.tenancy = tables, (layer, site), assigned
        self.rank, self.needs_plan, self.fused = tables.rank, needs_plan, fused
        self.looks = TableGate(tables, self.place, assigned) if tables.gates else None

    def stage(self, masters, stack):
        return TableStage([masters], stack)

    def tensors(self):
        return Slotted(self.tables.tensors(*self.place), self.tenancy, self.first)


class TableGate:
    """The gates of a site's tables, as patching/residual_add.py asks for an edit's own gate."""

    def __init__(self, tables, place, assigned):
        self.tables, self.place, self.tenancy = tables, place, assigned

    def gate(self):
        return self.tables.gate(*self.place)

    def say(self, rows):
        """g of rows (…, width), (…,) fp32, if a compiler or autograd must see the operations."""
        gate, rule = self.gate()
        flat = rows.reshape(-1, rows.shape[-1]).to(torch.promote_types(rows.dtype, torch.float32))
        said = gated_coefficient(flat, gate, rule, self.tenancy.slot(rows).reshape(-1), None)
        return said.float().view(rows.shape[:-1])


class TableStage(Stage):
    """A site's tables at work. Does nothing outside of an assignment."""

    def __init__(self, masters, stack):
        super().__init__(masters, stack)
        self.looks = masters[0].looks

    def arguments(self, hidden):
        served = self.masters[0]
        current = served.tenancy.now()
        if current is None or (not torch.compiler.is_compiling() and current.idle):
            return None
        coefficient = current.coefficient(hidden, self.stack)
        return served.tensors(), coefficient


# --- what a user assigns -----------------------------------------------------------------------------------------------


_STACKS = 'a stack of edits for one sequence is fastedit.Stack("a", "b")'


def check_name(name):
    if not isinstance(name, str):
        raise TypeError(f"name is {name!r}, expected a string")
    return name


def flat_names(names):
    """(names in a row, shape): (sequences,), or (batch, tokens) for nested lists."""
    if isinstance(names, (str, torch.Tensor)) or not isinstance(names, (list, tuple)):
        raise TypeError(
            f"names is {names!r:.60}, expected a list with one name per sequence (None: untouched); for packed sequences a "
            "list of lists, or tokens="
        )
    if not names:
        raise ValueError("assign() was given no names, expected one per sequence")
    nested = [isinstance(name, (list, tuple)) for name in names]
    if not any(nested):
        flat, shape = list(names), (len(names),)
    else:
        lengths = {len(row) if is_row else None for row, is_row in zip(names, nested, strict=True)}
        if len(lengths) > 1 or None in lengths or 0 in lengths:
            raise ValueError(
                "names holds lists of different lengths, or lists beside names: for packed sequences give one list "
                f"per sequence, each as long as the batch; {_STACKS}"
            )
        flat, shape = [name for row in names for name in row], (len(names), lengths.pop())
    for name in flat:
        if name is not None and type(name) is not Stack:
            check_name(name)
    return flat, shape


def dialled(names, strengths):
    """(names, one factor each). A Stack whose parts have strengths is another Stack, at factor 1."""
    if strengths is None or isinstance(strengths, (int, float)) or getattr(strengths, "shape", None) == ():
        strengths = [1.0 if strengths is None else strengths] * len(names)
    strengths = as_list("strengths", strengths, "one number, or one for each name")
    if len(strengths) != len(names):
        raise ValueError(
            f"{len(strengths)} strengths for {len(names)} names, expected one number, or one for each name "
            "(for a Stack that may be a list of numbers, one per part)"
        )
    found = []
    for name, strength in zip(names, strengths, strict=True):
        parts = type(name) is Stack and isinstance(strength, (list, tuple))
        found.append((name.at(strength), 1.0) if parts else (name, finite(strength)))
    return tuple(map(list, zip(*found, strict=True)))


def by_token(names, factors, shape, tokens):
    tokens = torch.as_tensor(tokens)
    if len(shape) > 1 or tokens.dim() != 2 or tokens.is_floating_point() or tokens.dtype is torch.bool or not tokens.numel():
        raise ValueError(
            f"tokens has shape {tuple(tokens.shape)} and dtype {tokens.dtype}, expected integers (batch, tokens) beside a "
            "plain list of names"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < -1 or high >= len(names):
        raise ValueError(f"tokens has numbers from {low} to {high}, expected −1 (untouched) to {len(names) - 1}")
    numbers = tokens.flatten().tolist()
    spread = [None if number < 0 else names[number] for number in numbers]
    return spread, [1.0 if number < 0 else factors[number] for number in numbers], tuple(tokens.shape)
