"""Putting the sites of one layer in force: fused if the proof allows, else after the site's own module."""

import itertools

from ..edits.sites import SITES
from ..families import alternatives, near_misses, submodule
from ..families.own_class import base_of
from .class_swap import CARRIED, CARRY, STACK, swap, swap_back, swappable
from .fused_chain import build_state
from .masters import Masters
from .recomputing import Carry
from .site import Ride
from .site_kinds import Gathered

_ADDED = ("mlp", "attn", "block")  # the sites that an add may follow


class Installation:
    """The sites in force at one layer. paths: {site: None if fused, else why it is plain}."""

    def __init__(self, layer, sites, verdicts, fused=True, stack=None):
        """verdicts: {recipe: Verdict} of the recipes that were tried.

        stack: the row_plan.Stack, if an edit has positions.
        """
        self.layer, self.swapped, self.hooks, self.carry = layer, [], [], None
        self.states = {}  # recipe → State
        self.paths = {site: "fused=False was asked" if not fused else _no_add(layer, site) for site in sites}
        for site in sites.values():
            site.ride = None
        try:
            for recipes in alternatives(layer.family) if fused else ():
                self._fuse_one_of(recipes, sites, verdicts)
            for module, here in self._by_module(sites).items():
                self._put(module, here)
            self._carry(layer.module, stack, [m for site in sites.values() for m in site.masters if isinstance(m, Masters)])
        except BaseException:
            self.undo()
            raise

    def _fuse_one_of(self, recipes, sites, verdicts):
        """Fuse by the recipe that was proved. Sites that it does not carry get a reason."""
        tried = [recipe for recipe in recipes if verdicts.get(recipe) is not None]
        recipe = next((recipe for recipe in tried if verdicts[recipe].reason is None), (tried or recipes)[0])
        reason = getattr(recipe, "why_plain", lambda site: None)
        for site in sites:
            self.paths[site] = (reason(site) if site in _ADDED else None) or self.paths[site]
        if not tried:
            return  # no site that a recipe of this owner could carry
        mine = {name: site for name, site in sites.items() if name in recipe.sites}
        for name in [name for name, site in mine.items() if site.module is not self.layer.at(name)]:
            del mine[name]
            self.paths[name] = "another library has wrapped its module since it was patched"
        if mine:
            self._fuse(recipe, mine, verdicts[recipe])

    def _fuse(self, recipe, sites, verdict):
        owner = submodule(self.layer.module, recipe.owner)
        reason = verdict.reason
        if reason is None and not swappable(owner):
            reason = "the layer's forward was replaced on the instance"
        self.paths.update(dict.fromkeys(sites, reason))
        if reason is None:

            def ride(site, dropout, apart):
                between, links = (find(recipe.owner, site) for find in (self.layer.between, self.layer.links))
                return Ride(between, dropout, apart, links)

            self.states[recipe] = build_state(recipe, owner, sites, verdict.norms, ride)
            for name, site in sites.items():
                if site.ride is None:
                    self.paths[name] = recipe.why_plain(name)
            self.states[recipe].own = tuple(s for s in sites.values() if s.module is owner and s.ride is not None)
            swap(owner, recipe, self.states[recipe])
            self.swapped.append(owner)

    def _by_module(self, sites):
        """{module: its sites that no fused forward serves}, in the order of SITES."""
        found = {}
        for name in (name for name in SITES if name in sites):
            module = sites[name].module
            if module not in self.swapped or sites[name].ride is None:
                found.setdefault(module, []).append(sites[name])
        return found

    def _put(self, module, sites):
        if module not in self.swapped and swappable(module):
            swap(module, None, sites[0] if len(sites) == 1 else Gathered(sites))
            self.swapped.append(module)
        else:
            for site in reversed(sites):  # the last hook put in front runs first
                self.hooks.append(site.put_hook(module))

    def _carry(self, module, stack, masters):
        """Let a layer's checkpointing take along what its forward had: strengths, assignments, the row plan."""
        if hasattr(base_of(module), "gradient_checkpointing") and swappable(module):
            if module not in self.swapped:
                swap(module, CARRIED, None)
                self.swapped.append(module)
            if stack is not None:
                module.__dict__[STACK] = stack
            self.carry = module.__dict__[CARRY] = Carry(self.layer.name, masters)

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
        if self.carry is not None:
            self.carry.changed = True
        for module in self.swapped:
            swap_back(module)
        for hook in self.hooks:
            hook.remove()


def _no_add(layer, site):
    if layer.family.name == "unknown":
        return "no family describes this layer" + near_misses(layer.module)
    if site in _ADDED:
        return layer.family.plain.get(site, "no recipe describes the adds of this layer")
    return "no add follows this site"


def link(installations):
    """Let each state compute the first norm of the state that reads its sum next (layers in order)."""
    for installation in installations:
        for recipe, state in installation.states.items():
            state.successor, state.carried = None, {}
            before = getattr(recipe, "after", None)
            if before is not None:
                _link(installation.state_of(submodule(installation.layer.module, before)), state)
    for first, second in itertools.pairwise(installations):
        if first.layer.index + 1 == second.layer.index and first.stack == second.stack:
            _link(first.last(), second.first())


def _link(state, successor):
    if state is not None and successor is not None and successor.entry is not None:
        state.successor = successor
