"""What runs at one site of one layer: a stack of masters, folded into as few passes as the rank allows."""

import torch
from torch.autograd import forward_ad

from ..arguments import MAX_RANK
from ..edits.form import at_strength, fold_all
from ..ops import parameter_changes as changes
from ..ops.native import NOTHING, bound, holds, try_edit
from ..ops.parameter_changes import optimizer_steps, stamp
from . import residual_add as adds
from .layer_plan import width_at
from .masters import DerivedMasters, as_written
from .probe_readings import Reading
from .recomputing import by_hand, dials
from .rows.gate_sensors import Tap, kernel_gate
from .rows.row_plan import NOWHERE

_transforms = torch._C._are_functorch_transforms_active


class Stage:
    """Consecutive edits of a site, at the same positions, that run as one form. stack: where their rows are known.

    on_x, on_sum: whether an add can carry it, on what is added or on the sum. Before the add, the sum does not exist.
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
        """((scale, bias, read, offset, write), strength) for the ops on hidden states, beside `looks`. None if no row
        is edited.

        Only the shape of the hidden states is used, unless a gate that is not the kernel's must look at them.

        One edit passes its own tensors, and its dial once that may differ from 1. Several edits are folded, strengths
        first, into tensors that do not move. With gradients or torch.compile they are folded in the graph. At some
        positions, or behind a gate, strength is one number per row.
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

        What a backward may save belongs to this forward. A dial that is turned later is another tensor (Masters.at),
        and a checkpoint that computes the forward again has the strengths that it had.
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
        last = self.folded, self.watched, self.lent  # alive until the new ones are all in their places, in one step
        watched, steps = [(held, name, t, stamp(t)) for m in self.masters for held, name, t in m.sources()], optimizer_steps()
        with torch.inference_mode(False), torch.no_grad():
            folded = self.keep(self.fold(False))
        self.folded, self.watched, self.steps, self.lent = folded, watched, steps, None
        del last
        return self._lent() if grad else self.folded, None

    def _strengths_then(self):
        """{Masters: strength of the forward that a checkpoint computes again}. None in a forward."""
        if by_hand():
            for m in self.masters:
                m.runs.check(m.strength, "strengths")
        return dials()

    def _lent(self):
        """The fold for a backward to save, which the next fold does not overwrite.

        A captured graph keeps the tensors that it writes to.
        """
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
        edited = adds.edit(hidden, *given, self.looks)
        return _with_norm_of(hidden, edited) if self.keep_norm else edited

    def standing(self):
        """((*tensors, strength, gate, rule), facts) for forwards without gradients, right while the facts hold.

        None if each forward has something of its own to say.
        """
        masters = self.masters
        if self.positions is not None or self.keep_norm or (self.gating is not None and self.looks is None):
            return None
        if any(m.tenancy is not None or m.whole is not None for m in masters):
            return None
        tensors, strength = self.form_and_dial()
        gate = adds.NO_GATE if self.looks is None else self.looks.gate()
        facts = [(self, "looks", self.looks), (self, "folded", self.folded)]
        if self.looks is not None:
            facts += [(self.looks._buffers, name, t) for name, t in self.looks._buffers.items()]
        for m in masters:
            facts += [(m, "strength", m.strength), (m, "dialled", m.dialled), (m.runs, "last", m.runs.last)]
            facts += m.sources()
            if self.only is None or isinstance(m, DerivedMasters):
                facts += [(t, None, stamp(t)) for _, _, t in m.sources()]
                facts += [(changes, "_steps", optimizer_steps()), (m, "kept", getattr(m, "kept", None))]
        return (*tensors, strength, *gate), tuple(facts)

    def fold(self, grad, then=None):
        """The edits' one form, differentiable. then: use those strengths."""
        with as_written(self.masters[0].dial):
            dials = [m.at if grad else m.dial for m in self.masters] if then is None else [then[m][0] for m in self.masters]
            return fold_all([at_strength(m.form(), d) for m, d in zip(self.masters, dials, strict=True)]).tensors()

    def in_place(self):
        return self.masters[0].dial.is_cuda

    def keep(self, folded):
        """The fold, in tensors of its own. On a GPU in those of the last one, if it fits: a CUDA graph may hold their addresses.

        On a CPU another thread may be reading the last one.
        """
        kept = self.folded
        same = kept is not None and self.in_place() and all(
            (a is None) == (b is None) and (a is None or (a.shape == b.shape and a.device == b.device))
            for a, b in zip(kept, folded, strict=True)
        )
        if not same:
            return tuple(None if t is None else t.detach().clone() for t in folded)
        for old, new in zip(kept, folded, strict=True):
            if new is not None:
                old.copy_(new)
        return kept


def _with_norm_of(hidden, edited):
    """The edited rows, scaled to their former length. A row that was not edited keeps its bits."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    before, after = (torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=dtype) for rows in (hidden, edited))
    share = before / torch.where(after > 0, after, torch.ones_like(after))
    same = (edited == hidden).all(-1, keepdim=True)
    return torch.where(same, edited, (edited.to(dtype) * share).to(edited.dtype))


class Ride:
    """Whether an add carries a site's edits in this call. If not, the site's own module applies them.

    Both sides ask, and nothing that they look at changes within a forward: a hook on a module between site and add (it
    must see the edit), an active dropout there, a dtype that the layer treats apart, a module that was replaced since
    (PEFT wraps the linear map, and what it adds comes after the edit).
    """

    def __init__(self, between, dropout=None, apart=None, links=()):
        self.between, self.dropout, self.apart, self.links = between, dropout, apart, links
        self.facts = (*((module, "_forward_hooks", NOTHING) for module in between),
                      *((holder._modules, name, module) for holder, name, module in links))  # fmt: skip
        if dropout is not None:  # facts for forwards to come: more is let through in `now`
            self.open = self.facts
            owner, module = getattr(dropout, "owner", dropout), getattr(dropout, "module", dropout)
            self.facts += (owner, "training", NOTHING),
            if module is not None:  # None: a function of a probability, which nobody can hook
                self.facts += (module, "_forward_hooks", NOTHING),

    def now(self, dtype):
        dropout = self.dropout
        if dropout is None:
            return holds(self.facts) and dtype is not self.apart
        active = dropout._forward_hooks or (dropout.training and dropout.p)
        return not active and holds(self.open) and dtype is not self.apart


class Site:
    """The edits at one site of one layer, in the order in which they were patched, on a module's output.

    patching/site_kinds.py has the other kinds.
    """

    reads_input = False
    whole = True  # what its module returns is all edited

    def __init__(self, layer, site):
        self.layer, self.site = layer, site
        self.module = layer.at(site)  # the edits stay on it, even if another library wraps it later
        self.width = width_at(layer, site)
        self.masters, self.stages = [], []
        self.ride = self.ready = None
        self.simple = None  # the Masters, where their one stage has nothing to ask: a compiler guards this, not the asking

    def __getstate__(self):
        return self.__dict__ | {"ready": None}

    def set(self, masters, stack=None):
        """Neighbors at the same positions fold while their ranks fit one kernel. Gates of other sites look first."""
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
        only = self.stages[0] if len(self.stages) == 1 else None
        plain = type(only) is Stage and only.only is not None and only.positions is only.gating is None
        self.simple = only.only if plain and self.whole and not (only.keep_norm or only.tenants) else None

    def apply(self, hidden):
        """Every edit, on hidden states (…, width)."""
        for stage in self.stages:
            hidden = stage.apply(hidden)
        if self.whole and len(self.stages) == 1 and not (torch.compiler.is_compiling() or torch.is_grad_enabled()):
            self._make_ready(self.stages[0])
        return hidden

    def _make_ready(self, stage):
        standing = getattr(stage, "standing", None)
        standing = None if standing is None else standing()
        if standing is not None:
            (*tensors, strength, gate, rule), facts = standing
            facts += ((self, "stages", self.stages), (self, "ride", self.ride))
            if holds(facts):
                self.ready = try_edit, (*tensors, None, strength, False, gate, rule), facts, torch.is_inference_mode_enabled()

    def after(self, module, output):
        """The site's module has returned `output`: apply the edits here, unless an add carries them."""
        if torch.compiler.is_compiling():
            only = self.simple
            if only is not None and isinstance(output, torch.Tensor):
                return adds.edit(output, only.tensors(), only.at if torch.is_grad_enabled() else only.dial)
        elif self.ride is None:
            done = bound(self.ready, output)
            if done is not None:
                return done
        if isinstance(output, torch.Tensor):
            return self._late(output)
        if type(output) in (tuple, list) and output and isinstance(output[0], torch.Tensor):
            return type(output)((self._late(output[0]), *output[1:]))
        raise TypeError(
            f"site {self.site!r} of layer {self.layer.name}: {type(module).__name__} returned "
            f"{type(output).__name__}, expected a tensor, or a tuple that starts with one"
        )

    def _late(self, hidden):
        if self.ride is not None and not torch.compiler.is_compiling() and self.ride.now(hidden.dtype):
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
