"""What runs at one site of one layer: a stack of masters, folded into as few passes as the rank allows."""

import torch

from . import lean
from .checks import MAX_RANK
from .form import at_strength, fold_all
from .row_plan import NOWHERE


class Stage:
    """Consecutive edits of a site, at the same positions, that run as one form. stack: where their rows are known."""

    def __init__(self, masters, stack=None):
        self.masters, self.positions = masters, masters[0].positions
        self.stack = None if self.positions is None else stack
        self.only = masters[0] if len(masters) == 1 and masters[0].direct else None  # tenants' never fold
        self.trainable = any(m.trainable for m in masters)
        self.folded, self.watched = None, []

    def arguments(self, shape):
        """((scale, bias, read, offset, write), strength) for the ops on hidden states of a shape; None where no row is
        meant.

        One edit passes its own tensors, and its dial once that may differ from 1. Several are folded,
        strengths first, into tensors that do not move; under grad or torch.compile they are folded in the
        graph. At some positions, strength is a number for each row.
        """
        if self.positions is None:
            return self.form_and_dial()
        coefficient = self.stack.coefficient(self.positions, shape, self.masters[0].dial.device)
        if coefficient is NOWHERE:
            return None
        tensors, dial = self.form_and_dial()
        if coefficient is None or dial is None:
            return tensors, dial if coefficient is None else coefficient
        return tensors, coefficient * dial

    def form_and_dial(self):
        """The form's tensors, and the dial (1,) that is not in them yet, or None."""
        only = self.only
        compiling = torch.compiler.is_compiling()
        if only is not None and (compiling or not only.dialled):
            return only.tensors(), only.dial if compiling else None
        if only is not None and (self.positions is None or only.tenancy is not None):
            return only.tensors(), only.dial
        if compiling or (self.trainable and torch.is_grad_enabled()):
            return self.fold(), None
        for held, name, tensor, version in self.watched:
            if held.get(name) is not tensor or tensor._version != version:
                break
        else:
            if self.watched:
                return self.folded, None
        with torch.inference_mode(False), torch.no_grad():
            self.keep(self.fold())
        self.watched = [(held, name, t, t._version) for m in self.masters for held, name, t in m.sources()]
        return self.folded, None

    def apply(self, hidden):
        given = self.arguments(hidden.shape)
        return hidden if given is None else lean.edit(hidden, *given)

    def fold(self):
        with torch.autocast(self.masters[0].dial.device.type, enabled=False):  # whose products would be bf16
            return fold_all([at_strength(m.form(), m.dial) for m in self.masters]).tensors()

    def keep(self, folded):
        """Into the tensors of the last fold, whose addresses a CUDA graph may hold, if they fit."""
        kept = self.folded
        same = kept is not None and all(
            (a is None) == (b is None) and (a is None or (a.shape == b.shape and a.device == b.device))
            for a, b in zip(kept, folded, strict=True)
        )
        if not same:
            self.folded = tuple(None if t is None else t.detach().clone() for t in folded)
            return
        for old, new in zip(kept, folded, strict=True):
            if new is not None:
                old.copy_(new)


class Ride:
    """Whether an add carries a site's edits in this call; if not, the site's own module applies them.

    Both sides ask, and nothing that they look at changes within a forward: a hook on a module between site
    and add (it must see the edit), an active dropout there, a dtype that the layer treats apart, a module that
    took another's place since (PEFT wraps the linear map: what it adds comes behind the edit).
    """

    def __init__(self, between, dropout=None, apart=None, links=()):
        self.between, self.dropout, self.apart, self.links = between, dropout, apart, links

    def now(self, dtype):
        for module in self.between:
            if module._forward_hooks:
                return False
        for holder, name, module in self.links:
            if holder._modules[name] is not module:
                return False
        dropout = self.dropout
        if dropout is not None and (dropout._forward_hooks or (dropout.training and dropout.p)):
            return False
        return dtype is not self.apart


class Site:
    """The edits at one site of one layer, in the order they were patched: on a module's output (site_kinds.py has
    the other kinds).
    """

    reads_input = False

    def __init__(self, layer, site):
        self.layer, self.site = layer, site
        self.module = layer.at(site)  # the edits stay on it, even if another library wraps it later
        self.masters, self.stages = [], []
        self.ride = None

    def set(self, masters, stack=None):
        """Neighbours at the same positions fold while their ranks fit one kernel."""
        groups, rank = [], 0
        for m in masters:
            alike = groups and m.positions == groups[-1][0].positions and m.tenancy is groups[-1][0].tenancy is None
            if alike and rank + m.rank <= MAX_RANK:
                groups[-1].append(m)
                rank += m.rank
            else:
                groups.append([m])
                rank = m.rank
        self.masters, self.stages = masters, [Stage(group, stack) for group in groups]

    def apply(self, hidden):
        """Every edit, on hidden states (…, width)."""
        for stage in self.stages:
            hidden = stage.apply(hidden)
        return hidden

    def after(self, module, output):
        """The site's module has returned `output`: apply the edits here, unless an add carries them."""
        if isinstance(output, torch.Tensor):
            return self._late(output)
        if isinstance(output, (tuple, list)) and output and isinstance(output[0], torch.Tensor):
            return type(output)((self._late(output[0]), *output[1:]))
        raise TypeError(
            f"site {self.site!r} of layer {self.layer.name}: {type(module).__name__} returned "
            f"{type(output).__name__}, expected a tensor, or a tuple that starts with one"
        )

    def _late(self, hidden):
        if self.ride is not None and self.ride.now(hidden.dtype):
            return hidden
        return self.apply(hidden)

    def hook(self, module, args, output):
        """The same as a forward hook, for a module whose forward was replaced on the instance."""
        return self.after(module, output)

    def put_hook(self, module):
        return module.register_forward_hook(self.hook, prepend=True)
