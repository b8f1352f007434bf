"""`fastedit.adopt`: a model that carries another library's edits gets the same outputs from fused ones.

Every adopter lists what it finds (found.py) and changes nothing. What can be adopted is put on as one stack of edits,
in the order in which it ran. Then each neighbor's own edit is taken out of force (switches.py) until `handle.remove()`.
What cannot be adopted is named with the reason and stays in force.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from typing import Any, Literal

from ..edits.kinds import LowRank, ScaleBias, Steer
from ..families import find_layers
from ..patching.handle import Handle, patch_as
from ..patching.model_edits import root_of
from . import ia3, pyreft, red_wrappers, repeng, steering_vectors
from .found import AROUND_LAYER, IN_HOOK, IN_LATE_HOOK, IN_MODULE, Refusal
from .places import Places

__all__ = ["AdoptedHandle", "adopt"]

_LOOKED_FOR = (
    "PEFT (IA)3 layers, interventions of an IntervenableModel or ReftModel (pass that, not the model in it), repeng's "
    "ControlModules, steering-vectors hooks, and RED wrapper modules (a child delta_vector with activation_scaling "
    "or activation_bias)"
)


def adopt(model: Any, *, positions: Literal["all", "call"] | None = None, fused: bool = True) -> AdoptedHandle:
    """Take over the edits that other libraries have put on a model. Returns an AdoptedHandle.

    Served are PEFT's (IA)³, pyvene's and pyreft's interventions, repeng's control vectors, steering-vectors' hooks and
    the wrapper modules of RED's authors. The edits start with the present values and are frozen. To train, call
    `handle.remove()` and train there. A change of the neighbor's own state meanwhile has no effect on the outputs, or
    raises if it can be noticed.

    Args:
        model: the object that one calls: the PeftModel, ReftModel, ControlModel or plain model. `handle.model` is the
            one that carries the edits: for a ReftModel and a ControlModel the model inside.
        positions: of pyvene's interventions, whose positions come with each call. None or "all": every position; a call
            of the IntervenableModel that asks for others raises. "call": where each such call says, the same for all
            interventions (a call of the model inside acts nowhere: `handle.mask` says where).
        fused: as for `fastedit.patch`.

    Raises:
        ValueError: there is nothing to adopt, or nothing that can be. Each edit is named with the reason. Nothing has
            changed. If only some can be adopted, a warning names the others, and `handle.left` has them.
    """
    inside = [held for held in (pyreft.inner_model(model), repeng.inner_model(model)) if held is not None]
    target = inside[0] if inside else model
    if root_of(target) is not None:
        raise ValueError(f"{type(target).__name__} is patched by fastedit already; adopt first, then patch")
    found = [
        *ia3.find(target), *red_wrappers.find(target), *steering_vectors.find(target),
        *pyreft.find(model, positions), *repeng.find(target),
    ]  # fmt: skip
    if not found:
        raise ValueError(f"{type(model).__name__} carries nothing to adopt; looked for {_LOOKED_FOR}")
    with _layers_in_sight(found):
        taken = _decide(target, found)
        left = [(one.name, one.reason) for one in found if one.reason is not None]
        if not any(one.forms for one in taken):
            left += [(one.name, "nothing is set on it") for one in taken]
            raise ValueError("nothing can be adopted:\n" + _listed(left))
        edits = edits_of(taken)
        if left:
            warnings.warn("fastedit: left as they were:\n" + _listed(left), stacklevel=2)
        switches = list(dict.fromkeys(one.switch for one in taken))
        kind = functools.partial(AdoptedHandle, switches, [one.name for one in taken], left)
        try:
            for switch in switches:
                switch.off()
            return patch_as(kind, target, edits, fused=fused)
        except BaseException:
            _put_back(switches)
            raise


class AdoptedHandle(Handle):
    """A Handle whose edits replace a neighbor's. `remove()` also puts the neighbor's back in force.

    adopted: names of what was taken over. left: (name, reason) of what was not.
    """

    def __init__(self, switches, adopted, left, *patched):
        self._switches, self.adopted, self.left = switches, adopted, left
        super().__init__(*patched)

    def _leave(self, patience=None):
        """Give the model back as it was adopted, with the neighbor's edits in force. A second call does nothing."""
        with self._root.turn:
            if self.removed:
                return
            with self._root.changing(self.model, "remove", patience=patience):
                super()._leave(patience)
                with _out_of_force(self.model, self._root):
                    _put_back(self._switches)


def _put_back(switches):
    for switch in reversed(switches):
        switch.on()


@contextlib.contextmanager
def _out_of_force(model, root):
    """Other handles' edits off while classes below them are swapped."""
    stacks = {(site.layer, site.site): site.masters for site in root.sites.values()}
    root.change(model, {key: [] for key in stacks})
    try:
        yield
    finally:
        root.change(model, stacks)


@contextlib.contextmanager
def _layers_in_sight(found):
    """Take wrappers around whole layers out of the lists, so that the layers are found. Those not adopted return."""
    hiding = [one for one in found if one.hides_layer]
    for one in hiding:
        one.switch.off()
    try:
        yield
    except BaseException:
        for one in hiding:
            one.switch.on()
        raise
    for one in hiding:
        if one.reason is not None:
            one.switch.on()


def _listed(left):
    return "\n".join(f"  {name}: {reason}" for name, reason in left)


# --- which of them, in which order ------------------------------------------------------------------------------


def _decide(target, found):
    """The edits that are adopted, in the order in which they run. The others get their reason."""
    sites = Places(find_layers(target))
    for one in found:
        _attempt(one, lambda one=one: sites.put(one))
    ordered = sorted((one for one in found if one.places), key=lambda one: (_around(one), one.when))
    while True:  # one that stays may keep others
        taken = [one for one in ordered if one.reason is None]
        for one in taken:
            _attempt(one, lambda one=one: _check_group(one, found))
            _attempt(one, lambda one=one: _check_order(one, taken, found))
        if all(one.reason is None for one in taken):
            return taken


def _attempt(one, function):
    try:
        if one.reason is None:
            function()
    except Refusal as refusal:
        one.reason = str(refusal)


def _check_group(one, found):
    missing = [other for other in found if other.group is one.group is not None and other.reason is not None]
    if missing:
        raise Refusal(f"its model's interventions are adopted together, and {missing[0].name} cannot be")


def _around(one):
    """Whether it is on a module around the site's own."""
    layer, site, _ = one.places[0]
    return layer.at(site) is not one.module


def _check_order(one, taken, found):
    """Check that nothing that stays runs between the site and this edit, which moves to the site."""
    if one.side == "input":
        return  # hooks before a module run before the edit of its input, adopted or not
    layer, site, _ = one.places[0]
    before = list(layer.at(site)._forward_hooks) if _around(one) else []
    if one.when == IN_HOOK:
        own = list(one.module._forward_hooks)
        before += own[: own.index(one.hook)]
    elif one.when in (IN_LATE_HOOK, AROUND_LAYER):
        before += one.module._forward_hooks
    if any(other.reason and other.module is one.module and IN_MODULE < other.when < one.when for other in found):
        raise Refusal("an edit that cannot be adopted runs before it")
    hooks = layer.at(site)._forward_hooks | one.module._forward_hooks
    before = [hook for hook in before if not _only_records(hooks[hook])]
    if not {other.hook for other in taken if other.when == IN_HOOK}.issuperset(before):
        raise Refusal("a hook that stays on the model runs before it, and would see the edited output")


def _only_records(hook):
    """Whether it is one that transformers puts on each layer at the first output_hidden_states=True, and leaves there."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


def edits_of(taken):
    """A stack of frozen edits. Edits that are alike, at one depth of the stack, become one edit over layers."""
    depth, alike = {}, {}
    for one in taken:
        for layer, site, forms in one.places:
            for form in forms:
                at = depth[layer, site] = depth.get((layer, site), -1) + 1
                given = tuple(t is not None for t in form.tensors())
                alike.setdefault((at, site, given, form.rank, one.positions), {})[layer.index] = form
    ordered = sorted(alike.items(), key=lambda item: item[0][0])
    return [_edit(site, forms, positions) for (_, site, _, _, positions), forms in ordered]


def _edit(site, forms, positions):
    some = next(iter(forms.values()))

    def by_layer(name):
        tensors = {layer: getattr(form, name) for layer, form in forms.items()}
        return tensors if getattr(some, name) is not None else None

    where = {"site": site, "positions": positions}
    if some.read is not None:
        return LowRank(by_layer("read"), by_layer("offset"), by_layer("write"), **where)
    if some.scale is None:
        return Steer(by_layer("bias"), **where)
    bias = by_layer("bias")
    return ScaleBias(by_layer("scale"), False if bias is None else bias, trainable=False, **where)
