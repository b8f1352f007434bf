"""A checkpoint computes a forward again in the backward. It then has what that forward had, whatever changed since.

transformers' checkpointing goes through a layer. The layer hands it a `Recomputed`: the layer's function, the context
of the forward (contextvars: assignments, row plans) and the strengths. A checkpoint made by hand tells us nothing.
There a recomputation is allowed only if all forwards since the last one had the same values (`Runs`).
"""

from contextvars import ContextVar, copy_context

import torch

_graph_task = torch._C._current_graph_task_id
_DIALS = ContextVar("the strengths of the forward that is computed again", default=None)
IN_FORCE = ContextVar("the assignments in force", default={})  # noqa: B039, never written to: {owner: in_force.Entered}


def recomputing():
    """Whether this is a recomputation in its own forward's context."""
    return _DIALS.get() is not None


def by_hand():
    """Whether this runs inside a backward, but not in its own forward's context. Asked where gradients are enabled."""
    return _graph_task() != -1 and _DIALS.get() is None


def dials():
    """{Masters: (its strength then (1,), whether that may differ from 1)}, in a recomputation in its forward's context.

    Else None.
    """
    return _DIALS.get()


class Carry:
    """What a layer with edits hands to its checkpointing function. changed: the layer has other edits now."""

    def __init__(self, name, masters):
        self.name, self.masters, self.changed = name, masters, False

    def through(self, checkpoint):
        """The checkpointing function, whose recomputations have what their forward had."""

        def with_its_own(function, *args, **kwargs):
            if torch.compiler.is_compiling():  # a graph computes again what it was given
                return checkpoint(function, *args, **kwargs)
            return checkpoint(Recomputed(self, function), *args, **kwargs)

        return with_its_own


class Recomputed:
    """A layer's function. When it runs again, it has the context and the strengths of the first time."""

    def __init__(self, carry, function):
        self.carry, self.function, self.again = carry, function, False
        self.context = copy_context()
        self.dials = {m: (m.at, m.dialled) for m in carry.masters}
        self.versions = [(t, t._version) for m in carry.masters if m.whole is None for t in m.masters().values()]
        for entered in IN_FORCE.get().values():
            entered.carried = True

    def __call__(self, *args, **kwargs):
        if not self.again:
            self.again = True
            return self.function(*args, **kwargs)
        if self.carry.changed:
            raise RuntimeError(
                f"layer {self.carry.name} was patched, or an edit removed from it, between a forward and its backward: a "
                "checkpointed layer is computed again in the backward, with the edits of the forward; run the backward first"
            )
        if any(tensor._version != version for tensor, version in self.versions):
            raise RuntimeError(
                f"tensors of an edit at layer {self.carry.name} were modified by an inplace operation between a forward and its "
                "backward (load_tensors, an optimizer's step): a checkpointed layer is computed again in the backward, with the "
                "edits of the forward; run the backward first"
            )
        return self.context.copy().run(self._run, args, kwargs)

    def _run(self, args, kwargs):
        _DIALS.set(self.dials)  # in a context of its own, which ends here
        return self.function(*args, **kwargs)


_NEVER = object()


class Runs:
    """The values of the forwards that a checkpoint made by hand may compute again, since the last time it did.

    Forwards in inference mode are never computed again and do not count. beside: those of the same model's other edits, which
    a refused backward does not come to.
    """

    def __init__(self):
        self.last, self.all, self.settled, self.beside = _NEVER, [], False, ()

    def note(self, value):
        """A forward had `value`. Called if it is not `last`."""
        if torch.is_inference_mode_enabled():
            return
        if self.settled:
            self.all.clear()
            self.settled = False
        if value not in self.all:
            self.all.append(value)
        self.last = value

    def check(self, value, what):
        """A backward computes a forward again, which now has `value`.

        Raises:
            RuntimeError: forwards had other values, and it is not known which one this forward had.
        """
        self.settled, self.last = True, _NEVER
        if self.all != [value]:
            for runs in self.beside:
                runs.settled, runs.last = True, _NEVER
            raise RuntimeError(
                f"a checkpoint made by hand computes a forward again, but earlier forwards had different {what}, and it "
                "is not known which of them this one had. Use model.gradient_checkpointing_enable(), which carries them; or call "
                "backward before they change. Forwards that need no gradient do not count in torch.inference_mode()"
            )
