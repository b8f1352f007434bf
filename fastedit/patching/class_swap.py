"""Swapping a module's class for a subclass of it, on this instance only, and back.

An instance attribute `forward` would be wrong: since transformers 5.23 gradient checkpointing wraps the forward of the
class and would silently stop. A forward hook costs 3.5 µs per call, where this costs nothing that could be measured (a
64-wide Linear at 17 µs, one thread). Hooks of others see the edited output.
"""

import contextlib
import functools
import inspect
import types

import torch

from ..families.own_class import BASE, base_of
from .fused_chain import FORWARDS
from .fused_layer import STATE
from .rows.in_force import copies

STACK = "_fastedit_stack"  # of a layer with edits at some positions: its row_plan.Stack
CARRY = "_fastedit_carry"  # of a layer with edits: its recomputing.Carry
_CHECKPOINT = "_gradient_checkpointing_func"  # where transformers keeps a layer's checkpointing function
PLANNED, CARRIED = "planned", "carried"  # recipes beside those of families: patching/rows/row_plan.py
_ENTRIES = {  # of a generating module: {its method: that of generating.Rows which is asked}
    "generate": "generate", "prepare_inputs_for_generation": "prepare", "generate_batch": "batches",
    "init_continuous_batching": "batches", "continuous_batching_context_manager": "batches",
}  # fmt: skip


@functools.cache
def swapped_class(base, recipe):
    """`base` with the recipe's fused forward. With recipe None, its own forward with the edits of the module's sites.

    PLANNED: its own forward under a row plan. CARRIED: its own, for a layer that hands its plan to checkpointing.
    """
    forward = _FORWARDS[recipe](base) if recipe in _FORWARDS else FORWARDS[type(recipe)](recipe, base)
    functools.update_wrapper(forward, base.forward)
    members = {
        "forward": forward,
        "__reduce_ex__": lambda self, protocol: (_restore, (base, recipe), self.__getstate__()),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        BASE: base,
    }
    if recipe == PLANNED:
        members |= {n: functools.wraps(getattr(base, n))(_asked(base, n)) for n in _ENTRIES if hasattr(base, n)}
        members["__call__"] = _called(base)
    if hasattr(base, "gradient_checkpointing"):
        members[_CHECKPOINT] = property(_checkpoint_of, _set_checkpoint)
    return type(base.__name__, (base,), members)


def _edited(base):
    def forward(self, *args, **kwargs):
        site = self.__dict__.get(STATE)
        if site is None:
            return base.forward(self, *args, **kwargs)
        if site.reads_input:
            args, kwargs = site.before(self, args, kwargs)
        return site.after(self, base.forward(self, *args, **kwargs))

    return forward


def _carried(base):
    def forward(self, *args, **kwargs):
        return base.forward(self, *args, **kwargs)

    return forward


def _planned(base):
    names = tuple(inspect.signature(base.forward).parameters)[1:]

    def forward(self, *args, **kwargs):
        state = self.__dict__.get(STATE)
        if state is None:
            return base.forward(self, *args, **kwargs)
        if state.root is not None:
            state.root.look()
            state = self.__dict__.get(STATE)  # a change that it has waited for, or modules that it has followed
        if state is None or state.stack is None:
            return base.forward(self, *args, **kwargs)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return state.stack.forward(base.forward, given, self, *args, **kwargs)

    return forward


def _asked(base, name):
    """A method of a generating module that first asks its Rows, which may answer in its place."""
    own = getattr(base, name)

    def method(self, *args, **kwargs):
        state = self.__dict__.get(STATE)
        if state is None or state.rows is None:
            return own(self, *args, **kwargs)
        with copies(self, args, kwargs) if name == "generate" else contextlib.nullcontext():
            return getattr(state.rows, _ENTRIES[name])(own, self, args, kwargs)

    return method


def _called(base):
    """A call, and not a forward: TRL puts a forward of its own on the instance, and gives that the labels. Without labels,
    within `generate`, which knows the mask, nothing is kept."""
    names = tuple(inspect.signature(base.forward).parameters)[1:]

    def __call__(self, *args, **kwargs):
        state, labels = self.__dict__.get(STATE), kwargs.get("labels")
        rows = None if state is None else state.rows
        if rows is None or not rows.answers or (labels is None and not torch.compiler.is_compiling() and rows.running):
            return base.__call__(self, *args, **kwargs)
        given = {} if labels is None else {"labels": labels}
        given["attention_mask"] = {**dict(zip(names, args, strict=False)), **kwargs}.get("attention_mask")
        return rows.called(given, base.__call__, self, *args, **kwargs)

    return __call__


_FORWARDS = {None: _edited, PLANNED: _planned, CARRIED: _carried}


def _checkpoint_of(module):
    try:
        checkpoint = module.__dict__[_CHECKPOINT]
    except KeyError:
        raise AttributeError(f"{type(module).__name__} has no attribute {_CHECKPOINT!r}") from None
    stack, carry = module.__dict__.get(STACK), module.__dict__.get(CARRY)
    checkpoint = checkpoint if stack is None else stack.checkpointed(checkpoint)
    return checkpoint if carry is None else carry.through(checkpoint)


def _set_checkpoint(module, checkpoint):
    module.__dict__[_CHECKPOINT] = checkpoint


def _restore(base, recipe):
    """An empty instance of the swapped class, for unpickling."""
    return object.__new__(swapped_class(base, recipe))


def swappable(module):
    """Whether calling the module reaches its class's forward (accelerate keeps that as `_old_forward`)."""
    replaced = "forward" in module.__dict__ and "_old_forward" not in module.__dict__
    return not replaced and not isinstance(module, torch.jit.ScriptModule)


def swap(module, recipe, state):
    """Give the module the class for `recipe`, which reads `state`."""
    module.__class__ = swapped_class(base_of(module), recipe)
    module.__dict__[STATE] = state
    if "_old_forward" in module.__dict__:
        module._old_forward = types.MethodType(type(module).forward, module)


def swap_back(module):
    """Restore the module's own class and forward. If another class was put on top, ours becomes inert."""
    module.__dict__.pop(STATE, None)
    module.__dict__.pop(STACK, None)
    module.__dict__.pop(CARRY, None)
    if BASE not in type(module).__dict__:
        return
    ours = type(module)
    module.__class__ = base_of(module)
    for name in ("_old_forward", "forward"):
        kept = module.__dict__.get(name)
        if getattr(kept, "__func__", None) is ours.forward:
            module.__dict__[name] = types.MethodType(type(module).forward, module)
