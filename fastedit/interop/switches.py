"""Taking a neighbor's edit out of force and putting it back exactly as it was.

Each switch has `off()` and `on()`. A second call of either does nothing. A module keeps its identity, its hooks, its
parameters and its place: its class is swapped for a subclass that passes the call on.
"""

import copyreg
import functools
import types

from ..patching.class_swap import swappable
from .found import Refusal


class ClassSwitch:
    """Swaps a module's class for one derived from it by `members(own, *arguments)`, a module-level function."""

    def __init__(self, module, members, *arguments):
        self.module, self.own = module, type(module)
        self.members, self.arguments = members, arguments

    def check(self):
        if not swappable(self.module):
            raise Refusal("its forward was replaced on the instance, so it cannot be passed over")
        return self

    def off(self):
        if type(self.module) is self.own:
            self._become(derived(self.own, self.members, *self.arguments))

    def on(self):
        if type(self.module) is not self.own:
            self._become(self.own)

    def _become(self, cls):
        self.module.__class__ = cls
        if "_old_forward" in self.module.__dict__:  # accelerate calls this one
            self.module._old_forward = types.MethodType(cls.forward, self.module)


class ListSwitch:
    """Puts what a wrapper wraps into the wrapper's place in a list of layers."""

    def __init__(self, layers, index, wrapper, inner):
        self.layers, self.index, self.wrapper, self.inner = layers, index, wrapper, inner

    def off(self):
        self.layers[self.index] = self.inner

    def on(self):
        self.layers[self.index] = self.wrapper


class HookSwitch:
    """Takes one forward hook off a module, and puts it back between the same hooks.

    Whoever registered it may remove it meanwhile. Its RemovableHandle then clears the id from all the dicts that it
    knows. So a mark under that id, which has no meaning without the hook, shows whether that has happened.
    """

    def __init__(self, module, hook):
        self.module, self.hook = module, hook
        self.function = module._forward_hooks[hook]
        self.order = list(module._forward_hooks)
        self.marks = module._forward_hooks_with_kwargs
        self.marked = hook in self.marks

    def off(self):
        if self.module._forward_hooks.pop(self.hook, None) is not None:
            self.marks.setdefault(self.hook, True)

    def on(self):
        hooks = self.module._forward_hooks
        if self.hook in hooks or self.hook not in self.marks:
            return
        if not self.marked:
            del self.marks[self.hook]
        before = set(self.order[: self.order.index(self.hook)])
        entries = list(hooks.items())
        at = max((n + 1 for n, (key, _) in enumerate(entries) if key in before), default=0)
        entries.insert(at, (self.hook, self.function))
        hooks.clear()  # in place: RemovableHandles hold this dict
        hooks.update(entries)


# --- derived classes, which copy and pickle with their instances -------------------------------------------------


@functools.cache
def derived(own, members, *arguments):
    """A subclass of `own` under its name, with the members that members(own, *arguments) returns."""
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    made = _metaclass(type(own))(own.__name__, (own,), names | members(own, *arguments))
    made._fastedit_recipe = (own, members, *arguments)
    return made


@functools.cache
def _metaclass(of):
    """Pickling a class looks up its name. For ours that finds the class it was derived from."""
    meta = type("Derived", (of,), {})
    copyreg.pickle(meta, lambda cls: (derived, cls.__dict__["_fastedit_recipe"]) if _is_derived(cls) else cls.__qualname__)
    return meta


def _is_derived(cls):
    return "_fastedit_recipe" in cls.__dict__


class _Outputs:
    """out_features of a wrapper that has none of its own: those of what it wraps."""

    def __init__(self, inner):
        self.inner = inner

    def __get__(self, module, owner=None):
        inner = module._modules[self.inner]
        return inner.out_features if hasattr(inner, "out_features") else inner.nf


def passing(own, inner):
    """Members: the call goes straight to the inner module."""

    def forward(self, *args, **kwargs):
        return self._modules[inner](*args, **kwargs)

    return {"forward": functools.update_wrapper(forward, own.forward), "out_features": _Outputs(inner)}
