"""What does not depend on the machine's mood: operations and bytes an edited layer, and a training step's peak memory.

An operation is a call into PyTorch that computes, or one into fastedit's kernels; views and allocations are free. Its
bytes are those of the tensors it takes and returns. A layer's share is the difference between a model of DEEPER layers
and one of SHALLOWER: embeddings, head and the last layer's end drop out, and the optimizer's share stays in.
"""

import contextlib
from unittest import mock

import torch
from torch.utils import _python_dispatch as dispatch
from torch.utils._pytree import tree_leaves

SHALLOWER, DEEPER = 2, 3
_FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh",
    "promote_types",  # of dtypes: no tensor in it
}  # fmt: skip


class Counter(dispatch.TorchDispatchMode):
    """Within it, `operations` and `bytes` grow."""

    def __init__(self):
        super().__init__()
        self.operations = self.bytes = 0
        self._inside = False  # of one that is counted already: an entry may call others
        self._watching = contextlib.ExitStack()

    def __enter__(self):
        for owner, name in _entries():
            watched = self._watched(getattr(owner, name))
            watched = staticmethod(watched) if isinstance(owner, type) else watched
            self._watching.enter_context(mock.patch.object(owner, name, watched))
        return super().__enter__()

    def __exit__(self, *exception):
        self._watching.close()
        return super().__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not _is_free(func):
            self._add((args, kwargs), out)
        return out

    def _watched(self, real):
        def counted(*args, **kwargs):
            if self._inside:
                return real(*args, **kwargs)
            self._inside = True
            try:
                with dispatch._disable_current_modes():
                    out = real(*args, **kwargs)
            finally:
                self._inside = False
            if out is not None:  # None: it was only asked, and nothing ran
                if args and isinstance(args[0], tuple):  # held ready: (op, its arguments, facts, …), then the rows
                    args = (*args[1:], *args[0][1])
                self._add((args, kwargs), out)
            return out

        return counted

    def _add(self, taken, returned):
        self.operations += 1
        once = {id(leaf): leaf for leaf in tree_leaves(returned)}  # one gradient may serve both parts of a sum
        for leaf in (*tree_leaves(taken), *once.values()):
            tensors = leaf.parameters() if hasattr(leaf, "parameters") else (leaf,)  # fastedit's Norm holds two
            self.bytes += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def _is_free(func):
    """Views return what aliases an input without writing to it."""
    if func._schema.name.partition("::")[2] in _FREE:
        return True
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def _entries():
    """Where kernels are called: they take raw pointers, which no dispatch mode sees."""
    from fastedit.dispatch import BACKENDS, load, why_not
    from fastedit.ops import autograd, public, registered
    from fastedit.patching import residual_add as adds
    from fastedit.patching import site as runtime

    backends = [load(name) for name in BACKENDS if why_not(name) is None]
    served = [(backend, name) for backend in backends for name, op in vars(backend).items() if callable(op)]
    asked = [(public, name) for name in vars(public) if name.startswith("try_")]
    run = [(module, "run") for module in (public, autograd, registered)]
    return [(adds.Add, "run"), (adds, "edit"), (adds, "bound"), (runtime, "bound"), *asked, *run, *served]


def count(step):
    """(operations, bytes) of one step that has run before."""
    with Counter() as counter:
        step()
    return counter.operations, counter.bytes


def per_layer(prepare):
    """(operations, bytes) a layer, where prepare(layers) → a step of a model that deep."""
    counted = []
    for layers in (SHALLOWER, DEEPER):
        step = prepare(layers)
        step()  # caches and optimizer states are there afterwards
        counted.append(count(step))
    return tuple(deep - shallow for shallow, deep in zip(*counted, strict=True))


def peak_bytes(step):
    """The most memory that a step which has run before holds beyond what was there at its start."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak
