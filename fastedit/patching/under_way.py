"""Changes of a model beside forwards in other threads. A change waits for the forwards that are under way, for PATIENCE at
most, and is refused then. A forward that begins during a change waits for it.

Forwards pay nothing for it. A change looks at what every other thread is doing (csrc/frames.cpp): a call of one of the model's
modules, of a module around it or of `generate` has a frame there. And each forward looks first whether the model's
modules are in their places (`Root.look`): while a change is under way, a `Held` stands there and makes it wait.

Without the native module, or on a Python without the GIL, no call is seen. Nor are a function of one's own that a compiler has
merged with the model's forward, a program that was exported, and methods under other names that call layer after layer.
"""

import contextlib
import os
import threading
import time
import warnings
import weakref

from torch import nn

from ..ops.native import _native

CALLS = frozenset(("forward", "__call__", "_call_impl", "_wrapped_call_impl", "generate"))
PATIENCE, AT_EXIT = 1.0, 60.0  # seconds that a change waits for forwards under way; the end of a `with` waits longer
_turns = weakref.WeakSet()


class Turn:
    """A reentrant lock that is free in a copy and in the child of a fork, whoever held it."""

    def __init__(self):
        self.lock = threading.RLock()
        _turns.add(self)

    def __enter__(self):
        self.lock.acquire()

    def __exit__(self, *_):
        self.lock.release()

    def __reduce__(self):
        return Turn, ()


def _renew():
    for turn in _turns:
        if not turn.lock._is_owned():  # by the thread that forked, which releases it
            turn.lock = threading.RLock()


os.register_at_fork(after_in_child=_renew)
MAKING = Turn()  # one thread at a time looks for a model's Root or makes one. Held before a Root's own turn, never after


class Held:
    """Stands in for a Root's Watch during a change. `then` is the Watch to put back.

    passing: threads whose calls began before the change, and which may end them. waiting: those that wait for the change.
    open: all pass, and are noted. limit: seconds that a forward waits, -1 for as long as it takes.
    """

    def __init__(self, root):
        self.root, self.then, self.limit = root, root.watch, -1
        self.open, self.passing, self.waiting = True, set(), set()

    def intact(self):
        mine = threading.get_ident()
        if self.open:
            self.passing.add(mine)
        elif mine not in self.passing:
            self.waiting.add(mine)
            if not self.root.turn.lock.acquire(timeout=self.limit):
                raise RuntimeError(
                    "this forward waits for handle.explain in another thread, which runs a forward itself. If this one is a part "
                    "of that one (a model whose forward uses threads of its own), explain cannot serve the model"
                )
            self.waiting.discard(mine)
            self.root.turn.lock.release()
        watch = self.then if self.root.watch is self else self.root.watch
        return watch is None or watch.intact()

    def moved(self):
        return self.then.moved()


@contextlib.contextmanager
def changing(model, root, what, patience=None):
    """A context in which this thread alone changes a model, its forwards stand still and its dials, too.

    A dial may be turned while this waits for forwards: one of them may be what turns it.

    Raises:
        RuntimeError: a forward of the model was under way in another thread for all of `patience` (PATIENCE). Nothing has
            changed.
    """
    with root.turn:
        if isinstance(root.watch, Held):  # a part of another change
            yield
            return
        root.watch = held = Held(root)
        try:
            held.passing |= calling(model).keys()
            held.open = False
            settle(model, what, held, patience)
            with root.dials:
                yield
        finally:
            root.watch = held.then


def leave(end, raised):
    """Call end(patience) where a `with` ends. raised: the kind of the exception that ends it, which is not hidden."""
    try:
        end(AT_EXIT)
    except RuntimeError as error:
        if raised is None:
            raise
        warnings.warn(f"fastedit: still in force: {error}", stacklevel=3)


def settle(model, what, held, patience=None):
    """Wait until no other thread is within a call of the model, but those that wait for this change.

    Raises:
        RuntimeError: after `patience`, in seconds.
    """
    end = time.monotonic() + (PATIENCE if patience is None else patience)
    while True:
        none = not held.passing
        busy = {ident: name for ident, name in calling(model).items() if ident not in held.waiting}
        for ident in held.passing - busy.keys():
            held.passing.discard(ident)
        if none and not busy:  # nobody passes any more, and nobody was within
            return
        if busy and time.monotonic() > end:
            raise RuntimeError(
                f"{what} changes a model of which a forward is under way in the thread {next(iter(busy.values()))!r}: that "
                "forward would have the change at some of its layers. Nothing has changed. Wait for it (join the thread, or "
                "take a lock around calls and changes). handle.strength, and Bank.add, replace, remove and assign need no waiting"
            )
        time.sleep(0.001)


def calling(model):
    """{ident: name} of the other threads that are within a call of the model."""
    threads, found = {}, {}
    for ident, first in () if _native is None else _native.calls_of_other_threads(CALLS):
        if isinstance(first, nn.Module):
            threads.setdefault(ident, []).append(first)
    inner = _modules(model) if threads else ()
    names = {thread.ident: thread.name for thread in threading.enumerate()} if threads else {}
    for ident, called in threads.items():
        around = set()  # what is within a module that was looked through
        for module in reversed(called):
            if id(module) not in inner and id(module) not in around:
                around |= _modules(module)
        if id(model) in around or any(id(module) in inner for module in called):
            found[ident] = names.get(ident, str(ident))
    return found


def _modules(model):
    """The ids of a module and of all within it. Its thread may be changing it: each list is taken in one step."""
    found, left = set(), [model]
    while left:
        module = left.pop()
        if module is not None and id(module) not in found:
            found.add(id(module))
            left += list(module._modules.values())
    return found
