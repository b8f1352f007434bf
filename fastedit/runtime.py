"""What runs at one site of one layer: a stack of masters, folded into as few passes as the rank allows."""

import torch
from torch.autograd import forward_ad

from . import lean
from .changes import optimizer_steps, stamp
from .checks import MAX_RANK
from .form import at_strength, fold_all
from .gating import Tap, kernel_gate
from .masters import as_written
from .planning import width_at
from .probes import Reading
from .recomputing import by_hand, dials
from .row_plan import NOWHERE

_transforms = torch._C._are_functorch_transforms_active


class Stage:
    """Consecutive edits of a site, at the same positions, that run as one form. stack: where their rows are known.

    on_x, on_sum: whether an add can carry it, of what is added or of the sum, which is not there before the add.
    """

    def __init__(self, masters, stack=None):
        first = masters[0]
        self.masters, self.positions, self.gating, self.keep_norm = masters, first.positions, first.gating, first.keep_norm
        self.stack = stack if first.needs_plan else None
        self.tenants = first.tenancy is not None and first.needs_plan and not first.alone
        self.looks = kernel_gate(first)  # the Sensor whose gate goes into the kernel
        self.on_x = not self.keep_norm
        self.on_sum = self.on_x and (self.gating is None or not self.gating.looks or self.looks is not None)
        self.only = masters[0] if len(masters) == 1 and masters[0].direct else None  # tenants' never fold
        self.trainable = any(m.trainable for m in masters)
        self.folded, self.lent, self.watched, self.steps = None, None, [], None

    def arguments(self, hidden):
        """((scale, bias, read, offset, write), strength) for the ops on hidden states, beside `looks`; None where no row
        is meant. Of hidden states, only a gate that looks at them, and is not the kernel's, needs more than the shape.

        One edit passes its own tensors, and its dial once that may differ from 1. Several are folded,
        strengths first, into tensors that do not move; under grad or torch.compile they are folded in the
        graph. At some positions, or behind a gate, strength is a number for each row.
        """
        if self.tenants:
            plan = self.stack.known_plan("tenants")
            plan.fit(hidden.shape, "tenants")
            plan.whole_rows("tenants")
        if self.positions is None and self.gating is None:
            return self.form_and_dial()
        gate = coefficient = None
        if self.gating is not None and self.looks is None:
            gate = self.gating.coefficient(hidden, self.stack)  # the prompt's, too
        if self.positions is not None:
            coefficient = self.stack.coefficient(self.positions, hidden.shape, self.masters[0].dial.device)
            if coefficient is NOWHERE:
                return None
        if gate is not None:
            coefficient = gate if coefficient is None else gate * coefficient
        tensors, dial = self.form_and_dial()
        if coefficient is None or dial is None:
            return tensors, dial if coefficient is None else coefficient
        return tensors, coefficient * dial

    def form_and_dial(self):
        """The form's tensors, and the dial (1,) that is not in them yet, or None.

        What a backward may save is of this forward: a dial that is turned since is another tensor (Masters.at), and a
        checkpoint that computes it again has the strengths that it had.
        """
        only, grad = self.only, torch.is_grad_enabled()
        if torch.compiler.is_compiling():
            return (self.fold(grad), None) if only is None else (only.tensors(), only.at if grad else only.dial)
        then = self._strengths_then() if grad else None
        for m in self.masters:
            if m.runs.last != m.strength and then is None and not (grad and by_hand()):
                m.runs.note(m.strength)
        if only is not None:
            dial, dialled = (only.at if grad else only.dial, only.dialled) if then is None else then[only]
            if not dialled:
                return only.tensors(), None
            if self.positions is None or only.tenancy is not None:
                return only.tensors(), dial
        if grad and (self.trainable or (then is not None and any(then[m][0] is not m.at for m in self.masters))):
            return self.fold(grad, then), None
        if _transforms() or forward_ad._current_level >= 0:  # changes.transformed, without a call
            return self.fold(grad), None
        for held, name, tensor, before in self.watched:
            if held.get(name) is not tensor or stamp(tensor) != before:
                break
        else:
            if self.watched and (not self.trainable or self.steps == optimizer_steps()):
                return self._lent() if grad else self.folded, None
        with torch.inference_mode(False), torch.no_grad():
            self.keep(self.fold(False))
        self.watched = [(held, name, t, stamp(t)) for m in self.masters for held, name, t in m.sources()]
        self.steps, self.lent = optimizer_steps(), None
        return self._lent() if grad else self.folded, None

    def _strengths_then(self):
        """{Masters: strength of the forward that a checkpoint computes again}, None in a forward."""
        if by_hand():
            for m in self.masters:
                m.runs.check(m.strength, "strengths")
        return dials()

    def _lent(self):
        """The fold for a backward to save, which the next fold leaves alone; a captured graph has the tensors that it
        writes to."""
        if self.masters[0].dial.is_cuda and torch.cuda.is_current_stream_capturing():
            return self.folded
        if self.lent is None:
            with torch.inference_mode(False):
                self.lent = tuple(None if t is None else t.clone() for t in self.folded)
        return self.lent

    def apply(self, hidden):
        given = self.arguments(hidden)
        if given is None:
            return hidden
        edited = lean.edit(hidden, *given, self.looks)
        return _with_norm_of(hidden, edited) if self.keep_norm else edited

    def fold(self, grad, then=None):
        """The edits' one form, differentiably; then: at those strengths."""
        with as_written(self.masters[0].dial):
            dials = [m.at if grad else m.dial for m in self.masters] if then is None else [then[m][0] for m in self.masters]
            return fold_all([at_strength(m.form(), d) for m, d in zip(self.masters, dials, strict=True)]).tensors()

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


def _with_norm_of(hidden, edited):
    """The edited rows at the length they had; a row that was not edited keeps its bits."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    before, after = (torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=dtype) for rows in (hidden, edited))
    share = before / torch.where(after > 0, after, torch.ones_like(after))
    same = (edited == hidden).all(-1, keepdim=True)
    return torch.where(same, edited, (edited.to(dtype) * share).to(edited.dtype))


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
        self.width = width_at(layer, site)
        self.masters, self.stages = [], []
        self.ride = None

    def set(self, masters, stack=None):
        """Neighbours at the same positions fold while their ranks fit one kernel. Gates of other sites look first."""
        masters = sorted(masters, key=lambda m: not m.is_sensor)
        groups, rank = [], 0
        for m in masters:
            if groups and rank + m.rank <= MAX_RANK and _fold(groups[-1][0], m):
                groups[-1].append(m)
                rank += m.rank
            else:
                groups.append([m])
                rank = m.rank
        self.masters, self.stages = masters, [_stage(group, stack) for group in groups]

    def apply(self, hidden):
        """Every edit, on hidden states (…, width)."""
        for stage in self.stages:
            hidden = stage.apply(hidden)
        return hidden

    def after(self, module, output):
        """The site's module has returned `output`: apply the edits here, unless an add carries them."""
        if isinstance(output, torch.Tensor):
            return self._late(output)
        if type(output) in (tuple, list) and output and isinstance(output[0], torch.Tensor):
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

def _fold(first, second):
    """Whether two edits may run as one form."""
    if first.is_sensor or second.is_sensor or first.alone or second.alone:
        return False
    return first.positions == second.positions and first.tenancy is second.tenancy is None


def _stage(masters, stack):
    if masters[0].is_sensor:
        return Tap(masters[0], stack)
    if masters[0].is_probe:
        return Reading(masters[0], stack)
    if masters[0].stage is not None:
        return masters[0].stage(masters[0], stack)
    return Stage(masters, stack)
