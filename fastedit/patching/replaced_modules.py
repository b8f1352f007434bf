"""Modules that are replaced after patching (an adapter merged and unloaded, a quantized map, another layer).

An edit is attached to the modules that it found. Before each forward of a stack, its owner checks that they are still
in place (`Watch.intact`, some dictionary look-ups). If one is not, its edits move to the module that is in the same
place now, if that is a place of the same kind. Else the forward is refused. A module that another library has wrapped
is still there.
"""

import itertools
import weakref

import torch

from ..families import find_layers
from .layer_plan import device_at, width_at

_numbers, _watches = itertools.count(), weakref.WeakValueDictionary()


class Watch:
    """The modules that a model's edits depend on: [(holder, name, module)], from the model down. lost: those not in
    it."""

    def __init__(self, root, model):
        self.root, self.links, self.lost = root, [], []
        paths = {id(module): path for path, module in model.named_modules()}
        wanted = [(i.layer.name, i.layer.module) for i in root.installed.values()]
        wanted += [(site.layer.name, site.module) for site in root.sites.values()]
        known = set()
        for layer, module in wanted:
            path = paths.get(id(module))
            if path is None:
                self.lost.append(layer)
                continue
            holder = model
            for name in path.split(".") if path else ():
                inner = holder._modules[name]
                if (id(holder), name) not in known:
                    known.add((id(holder), name))
                    self.links.append((holder, name, inner, layer))
                holder = inner
        self.__setstate__({})

    def __getstate__(self):
        return {name: self.__dict__[name] for name in ("root", "links", "lost")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.number = self.root.__dict__["number"] = next(_numbers)  # there a compiler guards it
        _watches[self.number] = self

    def intact(self):
        for holder, name, module, _ in self.links:
            if holder._modules.get(name) is not module:
                return False
        return not self.lost

    def moved(self):
        """Names of the layers with a module that is not where it was."""
        gone = {layer for holder, name, module, layer in self.links if holder._modules.get(name) is not module}
        return gone | set(self.lost)


@torch.compiler.assume_constant_result
def in_trace(number):
    """While a compiler looks on: refuse a module that is not in its place, because nothing can be moved then."""
    watch = _watches[number]
    if not watch.intact():
        raise RuntimeError(
            f"modules of {', '.join(sorted(watch.moved()))} were replaced since they were patched: call handle.report() or "
            "run a forward uncompiled, which put the edits on what is there now, and compile then"
        )
    return True


def follow(root, model):
    """Move a model's edits to the modules that are now in the places where they were patched.

    Raises:
        RuntimeError: the place is of another kind, or is gone.
    """
    moved = root.watch.moved()
    fresh = {layer.name: layer for layer in find_layers(model)}
    stacks, changed = {}, []
    for layer in root.layers:
        if layer.name not in moved:
            continue
        now = fresh.get(layer.name)
        if now is None:
            raise RuntimeError(f"layer {layer.name} has edits but is no longer in the model: {_WHAT_TO_DO}")
        changed.append((layer, now))
        for (name, site), there in root.sites.items():
            if name == layer.name:
                _check(there, now, site)
                stacks[layer, site] = there.masters
    for layer, now in changed:
        for name in ("module", "family", "final"):
            object.__setattr__(layer, name, getattr(now, name))
    present = {id(module) for module in model.modules()}
    for (layer, site), masters in stacks.items():
        if id(root.sites[layer.name, site].module) not in present:
            del root.sites[layer.name, site]  # a Site keeps its module while that is there, whatever wraps it
            for m in masters:
                if isinstance(m, torch.nn.Module):
                    m.to(device_at(layer, site))
    root.prove(list(stacks))
    root.change(model, stacks)


_WHAT_TO_DO = "remove() the handles, close() the banks, and patch the model as it is now"


def _check(there, now, site):
    if now.at(site) is None:
        raise RuntimeError(
            f"a module of layer {now.name} was replaced since it was patched, and {type(now.module).__name__} has no site "
            f"{site!r} now: {_WHAT_TO_DO}"
        )
    width = width_at(now, site)
    if width != there.width:
        raise RuntimeError(
            f"site {site!r} of layer {now.name} was replaced since it was patched: it is {width} wide now, and its edits are "
            f"{there.width} wide: {_WHAT_TO_DO}"
        )
