"""What is assigned where: each assignment of a bank, or of tenants, belongs to the context that entered it.

Contexts are those of contextvars. An asyncio task and asyncio.to_thread start with a copy of the context that started
them. A plain thread starts with an empty one. A forward from a context without an assignment, while another context has
one, is a request whose owner was lost. It is refused. A checkpoint's recomputations run in their own forward's context
(patching/recomputing.py).
"""

import contextlib
import itertools
import warnings
import weakref
from contextvars import ContextVar

import torch

from ...ops.running import exporting
from ..recomputing import IN_FORCE, Runs, by_hand, recomputing

_COPIES = ContextVar("rows a sequence may have", default=(1,))
_generating, _traced_copies = [], (1,)  # of all calls of `generate` under way: what torch.compile sees, which knows no contexts
_numbers, _owners = itertools.count(), weakref.WeakValueDictionary()


class Entered:
    """An assignment from entering to leaving it. carried: a checkpoint may compute a forward under it again."""

    def __init__(self):
        self.ended, self.carried, self.outer, self.number = False, False, None, next(_numbers)


class Owner:
    """A bank or a tenancy, which has assignments. unassigned: "refuse" or "warn"."""

    what = "assignment"

    def __init__(self, unassigned="refuse"):
        self.unassigned = unassigned
        self.__setstate__({})

    def __getstate__(self):
        """A copy has assignments of its own, and starts without any."""
        own = ("entered", "traced", "runs", "number")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.entered, self.runs, self.number = [], Runs(), next(_numbers)  # entered: in any context
        self.traced = None  # what torch.compile sees
        _owners[self.number] = self

    def now(self):
        """The Entered of this context, or None."""
        if torch.compiler.is_compiling():
            return self.traced
        found = IN_FORCE.get().get(self)
        if found is None or found.ended:
            found = self._lost(found)
        number = None if found is None else found.number
        if torch.is_grad_enabled() and by_hand():
            self.runs.check(number, f"{self.what}s")
        elif self.runs.last != number:
            self.runs.note(number)
        return found

    def _lost(self, found):
        if found is not None:
            if recomputing():
                return found
            raise RuntimeError(
                f"the {self.what} under which this task or thread was started has ended: enter one in the task itself, or "
                "wait for the task inside the `with`"
            )
        if self.entered and not (torch.is_grad_enabled() and by_hand()):
            message = (
                f"a forward from a context without an {self.what}, while there is one in another context: a thread does "
                "not inherit it. Enter the assignment in the thread, start the thread by asyncio.to_thread or with "
                "contextvars.copy_context().run, or assign None to sequences that are to stay unedited"
            )
            if self.unassigned == "refuse":
                raise RuntimeError(message)
            warnings.warn(message, stacklevel=2)
        return None

    def push(self, entered):
        held = IN_FORCE.get()
        entered.outer = held.get(self)
        IN_FORCE.set(held | {self: entered})
        self.entered.append(entered)
        self._trace()

    def pop(self, entered):
        """Leave an assignment, from any context. A context that still holds it sees that it has ended."""
        entered.ended = True
        self.entered.remove(entered)
        held = IN_FORCE.get()
        if held.get(self) is entered:
            outer = entered.outer
            while outer is not None and outer.ended:
                outer = outer.outer
            rest = {owner: found for owner, found in held.items() if owner is not self}
            IN_FORCE.set(rest if outer is None else rest | {self: outer})
        entered.outer = None
        self._trace()

    def _trace(self):
        """torch.compile sees nested assignments of one context as the last one. Of several contexts it sees none."""
        inner = {entered.outer for entered in self.entered}
        found = [entered for entered in self.entered if entered not in inner]
        self.traced = None if not found else found[0] if len(found) == 1 else _Several(self)

    def guarded(self, slot):
        """The slots, in a compiled graph, once it has run from the context in which they were assigned."""
        if not torch.compiler.is_compiling() or exporting():
            return slot
        return torch.ops.fastedit.assigned(slot, self.number)


class _Several:
    """What a compiled forward finds if several contexts have assignments in force."""

    plain = idle = False

    def __init__(self, owner):
        self.what = owner.what

    def coefficient(self, hidden, stack):
        raise RuntimeError(
            f"several threads or tasks have an {self.what} in force, and a compiled forward cannot tell threads apart: "
            "run compiled forwards under one assignment at a time, or the model uncompiled"
        )

    def slot(self, hidden):
        return self.coefficient(hidden, None)


_library = torch.library.Library("fastedit", "FRAGMENT")
_library.define("assigned(Tensor slot, int owner) -> Tensor", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe))


def _assigned(slot, owner):
    owner = _owners[owner]
    if torch._C._current_graph_task_id() == -1 and IN_FORCE.get().get(owner) is not owner.traced:
        raise RuntimeError(
            f"a compiled forward from a context without the {owner.what} that is in force in another: a thread does not "
            "inherit it. Enter the assignment in the thread that runs the model"
        )
    return slot.clone()


_library.impl("assigned", _assigned, "CompositeExplicitAutograd")
torch.library.register_fake("fastedit::assigned", lambda slot, owner: torch.empty_like(slot), lib=_library)


# --- rows of one sequence ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def copies(module, args, kwargs):
    """While `generate` runs: how many rows of a batch one sequence may be, by num_beams and num_return_sequences."""
    global _traced_copies
    config = kwargs.get("generation_config", args[1] if len(args) > 1 else None) or getattr(module, "generation_config", None)
    said = [kwargs.get(name) or getattr(config, name, None) or 1 for name in ("num_beams", "num_return_sequences")]
    token = _COPIES.set((*_COPIES.get(), *said))
    _generating.append(said)
    _traced_copies = (1, *itertools.chain(*_generating))
    try:
        yield
    finally:
        _COPIES.reset(token)
        _generating.remove(said)
        _traced_copies = (1, *itertools.chain(*_generating))


def check_batch(hidden, given, what):
    """Check that a batch has as many sequences as were `given` an owner, or in `generate` beams and samples of them.

    Raises:
        ValueError: another number of sequences, without a call of `generate` that makes several rows of a sequence.
    """
    batch = hidden.shape[0]
    if batch != given:
        allowed = _traced_copies if torch.compiler.is_compiling() else _COPIES.get()
        if batch % given or batch // given not in allowed:
            raise ValueError(
                f"assign() was given {given} {what}, but the batch has {batch} sequences: expected one of the {what} "
                "per sequence. Beams and samples of `generate` (num_beams, num_return_sequences) share their sequence's; "
                "other copies of a sequence are sequences of their own"
            )


def spread(each, hidden):
    """One value per row of hidden (batch, …, width), from one per sequence. Beams and samples share their
    sequence's."""
    batch = hidden.shape[0]
    each = each.to(hidden.device).repeat_interleave(batch // each.shape[0], output_size=batch)
    return each.view(-1, *[1] * (hidden.dim() - 2)).expand(hidden.shape[:-1]).contiguous()
