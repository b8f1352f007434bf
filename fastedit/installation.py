"""Putting the sites of one layer in force: fused where the proof allows, else after the site's own module."""

import itertools

from .families import submodule
from .fused import build_state
from .runtime import Ride
from .swapping import CARRIED, STACK, base_of, swap, swap_back, swappable


class Installation:
    """The sites in force at one layer. paths: {site: None if fused, else why it is plain}."""

    def __init__(self, layer, sites, verdicts, fused=True, stack=None):
        """verdicts: {recipe: Verdict}, of those recipes that were tried. stack: the row_plan.Stack, where an edit has
        positions."""
        self.layer, self.swapped, self.hooks = layer, [], []
        self.states = {}  # recipe → State
        self.paths = {site: "fused=False was asked" if not fused else _no_add(layer) for site in sites}
        for site in sites.values():
            site.ride = None
        try:
            for recipe in layer.family.fused if fused else ():
                mine = {name: site for name, site in sites.items() if name in recipe.sites}
                if mine:
                    self._fuse(recipe, mine, verdicts[recipe])
            for name, site in sites.items():
                if layer.at(name) not in self.swapped:
                    self._put(layer.at(name), site)
            if stack is not None:
                self._carry(layer.module, stack)
        except BaseException:
            self.undo()
            raise

    def _fuse(self, recipe, sites, verdict):
        owner = submodule(self.layer.module, recipe.owner)
        reason = verdict.reason
        if reason is None and not swappable(owner):
            reason = "the layer's forward was replaced on the instance"
        self.paths.update(dict.fromkeys(sites, reason))
        if reason is None:

            def ride(site, dropout, apart):
                return Ride(self.layer.between(recipe.owner, site), dropout, apart)

            self.states[recipe] = build_state(recipe, owner, sites, verdict.norms, ride)
            swap(owner, recipe, self.states[recipe])
            self.swapped.append(owner)

    def _put(self, module, site):
        if swappable(module):
            swap(module, None, site)
            self.swapped.append(module)
        else:
            self.hooks.append(module.register_forward_hook(site.hook, prepend=True))

    def _carry(self, module, stack):
        """Let a layer's checkpointing take the row plan along."""
        if hasattr(base_of(module), "gradient_checkpointing") and swappable(module):
            if module not in self.swapped:
                swap(module, CARRIED, None)
                self.swapped.append(module)
            module.__dict__[STACK] = stack

    @property
    def stack(self):
        return self.layer.name.partition(".")[0]

    def first(self):
        """The state that reads the hidden states entering the layer, or None."""
        return next((s for r, s in self.states.items() if getattr(r, "after", None) is None), None)

    def last(self):
        """The state whose sum leaves the layer, or None."""
        return next((s for r, s in self.states.items() if "block" in r.sites), None)

    def state_of(self, module):
        return next((s for s in self.states.values() if s.module is module), None)

    def undo(self):
        for module in self.swapped:
            swap_back(module)
        for hook in self.hooks:
            hook.remove()


def _no_add(layer):
    if layer.family.name == "unknown":
        return "no family describes this layer"
    return "the layer ends in a norm: there is no add for the edit to ride on"


def link(installations):
    """Let each state compute the first norm of the one that reads its sum next (layers in order)."""
    for installation in installations:
        for recipe, state in installation.states.items():
            state.successor = state.carried = None
            before = getattr(recipe, "after", None)
            if before is not None:
                _link(installation.state_of(submodule(installation.layer.module, before)), state)
    for first, second in itertools.pairwise(installations):
        if first.layer.index + 1 == second.layer.index and first.stack == second.stack:
            _link(first.last(), second.first())


def _link(state, successor):
    if state is not None and successor is not None and successor.entry is not None:
        state.successor = successor
