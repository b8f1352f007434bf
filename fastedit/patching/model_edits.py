"""`model.fastedit`: the one submodule that holds all edits of a model, and what is in force where."""

import warnings

import torch
from torch import nn

from ..families import alternatives, find_layers
from ..families.own_class import base_of
from . import shape_probe as probe
from . import state_dicts as states
from .installation import Installation, link
from .plan_owners import check_layout, install, owner_of, uninstall
from .proof import fingerprint, prove
from .replaced_modules import Watch, follow, in_trace
from .rows.generating import Rows
from .rows.row_plan import Stack
from .site_kinds import site_at
from .under_way import Held, Turn, changing, settle


class Root(nn.Module):
    """One child per handle. Beside them, but not as submodules: the handles, sites and installations.

    All of it is copied and pickled with the model, so a copy has handles of its own.
    """

    def __init__(self, model):
        super().__init__()
        self.handles = {}  # name → Handle or Bank, in the order of patching
        self.layers = find_layers(model)
        self.shapes = self._shapes(model)  # layer index → what it hands on, for layers that no recipe describes
        self.sites = {}  # (layer name, site name) → Site
        self.installed = {}  # layer name → Installation
        self.verdicts = {}  # (layer name, recipe) → Verdict
        self.merged = []  # handles whose edits are in the weights, in the order of merging
        self.rows = Rows()
        self.stacks, self.planned = {}, []  # of edits with positions: {name: Stack}, and the modules swapped for them
        self.owned, self.watch = False, None  # whether rows are assigned to banks or tenants; a Watch
        self.turn, self.dials = Turn(), Turn()  # held by who changes the model; by who turns a dial. In this order
        self.warned = set()  # what was said of this model already
        self.owners = {}  # {stack name: the module that is given its tokens}
        self.frozen = []  # the parameters that freeze=True found trainable

    def __getstate__(self):
        state = self.__dict__ | {"watch": self.watch.then if isinstance(self.watch, Held) else self.watch}
        state.pop("number", None)  # the copied Watch sets its own
        return state

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """Save with a note of what the edits are, so that a saved model holds them whole (patching/state_dicts.py)."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if (note := states.note(self)) is not None:
            destination[prefix + states.KEY] = note

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(prefix + states.KEY, None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def new_name(self, kind="patch"):
        return next(f"{kind}{n}" for n in range(len(self.handles) + 1) if f"{kind}{n}" not in self.handles)

    def put(self, model):
        """Be the submodule of a model that holds its edits, if it is not yet."""
        if "fastedit" not in model._modules:
            model._modules["fastedit"] = self
            if hasattr(model, states.SAVE):
                model.__dict__[states.SAVE] = states.Saving(model)

    def drop(self, model, name):
        """Forget a handle or a bank whose sites are empty already. The last one takes everything off the model."""
        del self._modules[name], self.handles[name]
        if not any(handle.freeze for handle in self.handles.values()):
            for parameter in self.frozen:
                parameter.requires_grad_(True)
            self.frozen = []
        if not self.handles:
            del model._modules["fastedit"]
            if isinstance(model.__dict__.get(states.SAVE), states.Saving):
                del model.__dict__[states.SAVE]

    def _shapes(self, model):
        known = {}
        for layer in self.layers:
            recipes = {fingerprint(layer, recipe): recipe for recipe in layer.family.fused}
            known |= {key: prove(layer, recipe).reason is None for key, recipe in recipes.items() if key not in known}
            if not any(known[key] for key in recipes):
                return probe.output_shapes(model, self.layers) or {}
        return {}

    def check(self, places):
        """Check that edits act on what they should: [(layer, site, width, by_token, reads)] (patching/shape_probe.py).

        Raises:
            ValueError: a layer that passes on something else than (batch, tokens, width).
        """
        for layer, site, width, by_token, reads in places:
            probe.check(layer, site, width, self.shapes.get(layer.index, ()), by_token, reads)

    def prove(self, wanted):
        """Verdicts on the recipes that could carry the sites `wanted`, [(layer, site name)]."""
        known = {}
        for layer, site in wanted:
            for recipes in alternatives(layer.family):
                if any(site in recipe.sites for recipe in recipes):
                    self._settle(layer, recipes, known)

    def _settle(self, layer, recipes, known):
        """Prove a layer's alternatives until one holds. Warns if none does."""
        for recipe in recipes:
            key = fingerprint(layer, recipe)
            fresh = key not in known
            if fresh:
                known[key] = prove(layer, recipe)
            verdict = self.verdicts[layer.name, recipe] = known[key]
            if verdict.reason is None:
                return
        if fresh:
            reasons = "; ".join(dict.fromkeys(self.verdicts[layer.name, recipe].reason for recipe in recipes))
            message = f"fastedit: plain path for {', '.join(recipes[0].sites)} of {base_of(layer.module).__name__}: {reasons}"
            if message not in self.warned:
                self.warned.add(message)
                warnings.warn(message, stacklevel=5)

    def change(self, model, stacks):
        """Put new stacks of masters at some sites, {(layer, site name): [Masters]}. [] empties a site.

        Raises:
            RuntimeError: a forward has begun in another thread, in a stack that has had no edits. Nothing has changed.
        """
        before = set(self.owners)
        self._plan(model, stacks)
        if not before >= self.owners.keys():  # from here on its forwards wait; one may have begun before
            try:
                settle(model, "this", self.watch if isinstance(self.watch, Held) else Held(self))
            except RuntimeError:
                self._plan(model, {})
                raise
        touched = {}
        for (layer, name), masters in stacks.items():
            key, touched[layer.name] = (layer.name, name), layer
            if masters:
                self.sites.setdefault(key, site_at(layer, name)).set(masters, self._stack_of(layer))
            else:
                self.sites.pop(key, None)
        for layer in touched.values():
            if layer.name in self.installed:
                self.installed.pop(layer.name).undo()
            sites = {site.site: site for key, site in self.sites.items() if key[0] == layer.name}
            if sites:
                verdicts = {r: self.verdicts.get((layer.name, r)) for r in layer.family.fused}
                fused = all(m.fused for site in sites.values() for m in site.masters)
                placed = any(m.needs_plan for site in sites.values() for m in site.masters)
                stack = self._stack_of(layer) if placed else None
                self.installed[layer.name] = Installation(layer, sites, verdicts, fused, stack)
        runs = [m.runs for site in self.sites.values() for m in site.masters if hasattr(m, "runs")]
        for one in runs:
            one.beside = runs
        link([self.installed[layer.name] for layer in self.layers if layer.name in self.installed])
        watch = Watch(self, model)
        if isinstance(self.watch, Held):
            self.watch.then = watch
        else:
            self.watch = watch

    def changing(self, model, what, **patience):
        """A context in which this thread alone changes the model (patching/under_way.py)."""
        return changing(model, self, what, **patience)

    def look(self):
        """Follow modules that were replaced since the model was patched (patching/replaced_modules.py)."""
        if torch.compiler.is_compiling():
            in_trace(self.number)
        elif not self.watch.intact():
            with self.turn:  # of several forwards that see it, one follows
                if not self.watch.intact():
                    follow(self, next(iter(self.handles.values())).model)

    def _stack_of(self, layer):
        return self.stacks.get(layer.name.partition(".")[0])

    def _plan(self, model, stacks):
        """Row plans for the stacks of layers where an edit, a gate or a probe needs them, and for no others."""
        masters = {key: site.masters for key, site in self.sites.items()}
        masters |= {(layer.name, name): found for (layer, name), found in stacks.items()}
        for (layer, name), found in stacks.items():
            if any(m.needs_plan for m in found):
                check_layout(layer, name)
        wanted = {key[0].partition(".")[0] for key, found in masters.items() if any(m.needs_plan for m in found)}
        owned = any(getattr(m, "tenancy", None) is not None for found in masters.values() for m in found)
        edited = {key[0].partition(".")[0] for key, found in masters.items() if found}
        owners = {}
        for layer in self.layers:
            name = layer.name.partition(".")[0]
            if name in edited and name not in owners and (owner := owner_of(model, layer.module)) is not None:
                owners[name] = owner
        if wanted == set(self.stacks) and owned == self.owned and owners == self.owners:
            return
        uninstall(self.planned)
        kept = self.stacks
        same = {name for name, stack in kept.items() if stack.owner is owners.get(name)}
        self.stacks = {n: kept[n] if n in same else Stack(n, owners[n], self.rows) for n in owners if n in wanted}
        self.owned, self.owners = owned, owners
        self.planned = install(model, self.stacks.values(), self.rows, owners.values(), self)

    def stack(self, layer, site):
        """The masters at a site, in order."""
        found = self.sites.get((layer.name, site))
        return [] if found is None else found.masters


def mark_first(members):
    """Mark the first of [(layer, what is there)] in each stack: a forward reaches it first."""
    seen = set()
    for layer, masters in members:
        stack = layer.name.partition(".")[0]
        masters.first, _ = stack not in seen, seen.add(stack)


def root_of(model):
    """This model's Root, or None. Raises if another attribute or another patch is in the way."""
    root = model._modules.get("fastedit")
    if isinstance(root, Root):
        return root
    if hasattr(model, "fastedit"):
        raise ValueError(f"{type(model).__name__} already has an attribute 'fastedit' that is not a patch")
    inner = next((name for name, m in model.named_modules() if isinstance(m, Root)), None)
    if inner is not None:
        raise ValueError(
            f"the submodule {inner.rpartition('.')[0]!r} is already patched; patch the same module again, "
            "or remove its handles first"
        )
    return None
