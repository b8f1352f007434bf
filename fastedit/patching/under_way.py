"""A change of a model, and the forwards of other threads: it is refused beside one, and one that begins meanwhile waits.

Forwards pay nothing for it. A change looks at what every other thread is doing (`sys._current_frames`): a call of one of the
model's modules, of a module around it or of `generate` has a frame there. And each forward looks first whether the model's
modules are in their places (`Root.look`): while a change is under way, a `Held` stands there and makes it wait.

Not seen are a function of one's own that a compiler has merged with the model's forward, and a program that was exported.
"""

import contextlib
import sys
import threading

from torch import nn

CALLS = frozenset(("forward", "__call__", "_call_impl", "_wrapped_call_impl", "generate"))
TURN = threading.RLock()  # one change at a time, of all models: a change takes milliseconds


class Held:
    """In the place of a Root's Watch while its model is changed. `then` is the Watch to be."""

    def __init__(self, root):
        self.root, self.then = root, root.watch

    number = property(lambda self: self.then.number)

    def intact(self):
        with TURN:  # a thread that changes the model itself passes
            watch = self.then if self.root.watch is self else self.root.watch
        return watch is None or watch.intact()

    def moved(self):
        return self.then.moved()


@contextlib.contextmanager
def changing(model, root, what):
    """A context in which this thread alone changes a model and its forwards stand still.

    Raises:
        RuntimeError: a forward of the model is under way in another thread. Nothing has changed.
    """
    with TURN:
        if isinstance(root.watch, Held):  # a part of another change
            yield
            return
        root.watch = held = Held(root)
        try:
            refuse(model, what)
            yield
        finally:
            root.watch = held.then


def refuse(model, what):
    """Raise if a forward of the model is under way in another thread."""
    name = _caller(model)
    if name is not None:
        raise RuntimeError(
            f"{what} changes a model of which a forward is under way in the thread {name!r}: that forward would have the change "
            "at some of its layers. Nothing has changed. Wait for it (join the thread, or take a lock around calls and "
            "changes). handle.strength, and Bank.add, replace, remove and assign need no waiting"
        )


def _caller(model):
    """The name of another thread that is within a call of the model, or None."""
    modules, own = None, threading.get_ident()
    for ident, frame in sys._current_frames().items():
        while frame is not None and ident != own:
            code = frame.f_code
            if code.co_name in CALLS and code.co_varnames:
                called = frame.f_locals.get(code.co_varnames[0])
                if isinstance(called, nn.Module):
                    modules = set(map(id, model.modules())) if modules is None else modules
                    if id(called) in modules or any(inner is model for inner in called.modules()):
                        names = {thread.ident: thread.name for thread in threading.enumerate()}
                        return names.get(ident, str(ident))
            frame = frame.f_back
    return None
