"""The tensors of one edit at one site of one layer: fp32 masters, a submodule of the model."""

import contextlib

import torch
from torch import nn
from torch.autograd import Function

from ..edits.form import Form
from ..edits.kinds import TENSORS, Edit
from ..ops.fp32_module import InFp32
from ..ops.parameter_changes import optimizer_steps, stamp, transformed
from .orthonormal_basis import Tangent, retract_, retracted, tangent
from .recomputing import Runs
from .rows.tenants import Slotted


class Masters(InFp32):
    """An edit's tensors: parameters if it is trainable, else buffers. They are fp32 whatever the model becomes.

    `dial` (1,) is the edit's present strength, fp32 and not saved. `strength` is the same number for Python. `at` (1,)
    is the same again, for a forward with a backward: when the dial is turned in place, `at` becomes another tensor.
    With a Tenancy the tensors have a leading tenant dimension. All tenants start alike.
    """

    is_sensor = False

    def __init__(self, edit, spot, width, device, tenancy=None):
        super().__init__()
        self.is_probe, self.stage = edit.is_probe, edit.stage
        self.options = {name: getattr(edit, name) for name in edit.options}
        self.form_of, self.trainable, self.rank, self.tenancy = edit.form, edit.trainable, edit.rank, tenancy
        self.positions, self.keep_norm = edit.positions, edit.keep_norm
        self.gating = None  # its gating.Gating, if planning gives it one
        self.direct = edit.form is Edit.form  # the masters are the normal form's own tensors
        for name, tensor in edit.tensors(spot, width).items():
            tensor = tensor if tenancy is None else tensor.expand(tenancy.count, *tensor.shape)
            tensor = tensor.to(device, torch.float32, copy=True, memory_format=torch.contiguous_format)
            if self.trainable:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        self.register_buffer("dial", torch.full((1,), edit.strength, device=device), persistent=False)
        self.strength, self.first, self.runs = edit.strength, False, Runs()
        self.dialled = not self.trainable or edit.strength != 1.0
        self._note()
        self.whole = None  # fastedit.distributed.whole, for masters laid out over several processes

    @property
    def needs_plan(self):
        """Whether it must know a forward's tokens."""
        if self.is_probe or self.stage is not None or self.tenancy is not None:
            return True
        return self.positions is not None or (self.gating is not None and self.gating.needs_plan)

    @property
    def alone(self):
        """Whether it is a stage of its own."""
        return self.gating is not None or self.keep_norm or self.is_probe or self.stage is not None

    def masters(self):
        """{name: tensor}"""
        if self.trainable:
            return dict(self._parameters)
        return {name: tensor for name, tensor in self._buffers.items() if name != "dial"}

    def sources(self):
        """(dict that holds it, name, tensor) of all that the edit's form depends on."""
        return [(held, name, t) for held in (self._parameters, self._buffers) for name, t in held.items()]

    def form(self):
        """The normal form at strength 1, differentiable."""
        masters = self.masters()
        if self.whole is not None:
            masters = {name: self.whole(tensor) for name, tensor in masters.items()}
        return self.form_of(masters)

    def tensors(self):
        """(scale, bias, read, offset, write), if they need no folding (`direct`). Slotted for tenants."""
        get = (self._parameters if self.trainable else self._buffers).get
        own = tuple(get(name) for name in TENSORS)
        if self.whole is not None:
            own = tuple(None if tensor is None else self.whole(tensor) for tensor in own)
        return own if self.tenancy is None else Slotted(own, self.tenancy, self.first)

    def set_strength(self, strength):
        self.strength = strength
        self.dialled = self.dialled or strength != 1.0
        self.dial.fill_(strength)
        self._note()

    def _note(self):
        with torch.inference_mode(False):
            self.at = torch.full((1,), self.strength, device=self.dial.device)

    def _apply(self, fn, recurse=True):
        was_meta = self.dial.is_meta
        applied = super()._apply(fn, recurse)
        if was_meta and not self.dial.is_meta:  # to_empty: nothing will load what no state dict holds
            with torch.inference_mode(False):
                self.dial.fill_(self.strength)
        if self.at.device != self.dial.device:
            self._note()
        return applied

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        device = next(iter(self.masters().values())).device
        if self.dial.is_meta and device.type != "meta":  # assign=True onto a model made on meta
            self.dial = torch.full((1,), self.strength, device=device)
            self._note()

    def extra_repr(self):
        return ", ".join(f"{n} {tuple(t.shape)}" for n, t in self.masters().items())


class DerivedMasters(Masters):
    """Masters from which the normal form's tensors follow: LoReFT's W and R give read = W − R and write = R.

    The derived tensors are computed once after each change, for all layers of the edit (`group`) in one batch, and kept
    at fixed addresses. Version counters of the masters and optimizers' steps (ops/parameter_changes.py) show a change.
    So any optimizer, wrapper or loader may make one. A constrained master is retracted at the same moment, before
    anything reads it.
    """

    def __init__(self, edit, spot, width, device, tenancy=None):
        super().__init__(edit, spot, width, device, tenancy)
        self.derive, self.pull_back, self.constrained = edit.derive, edit.pull_back, edit.constrained
        self.direct = True
        self.group, self.seen, self.kept = [self], (), None
        self.steps, self.settled = None, None  # of optimizers, when last settled; the masters then, of a whole batch

    def settle(self):
        """Retract and derive, if a master has changed since the last time."""
        held = self._parameters if self.trainable else self._buffers
        if laid_out(held):
            return  # derived from whole tensors when it is used
        for name, tensor, before in self.seen:
            if held[name] is not tensor or stamp(tensor) != before:
                break
        else:
            if self.seen and (not self.trainable or self.steps == optimizer_steps()):
                return
        settle(self.group)

    def masters(self):
        if not (torch.compiler.is_compiling() or transformed()):
            self.settle()
        return super().masters()

    def form(self):
        return Form(*self._form_tensors())

    def tensors(self):
        own = self._form_tensors()
        return own if self.tenancy is None else Slotted(own, self.tenancy, self.first)

    def _form_tensors(self):
        if torch.compiler.is_compiling():
            return self._in_graph()
        if transformed():
            return self._under_a_transform()
        if self.whole is not None:
            return self.derive({name: self.whole(tensor) for name, tensor in self._parameters.items()})
        self.settle()
        if self.trainable and torch.is_grad_enabled():
            return Derived.apply(self, *self._parameters.values())
        return self.kept

    def _under_a_transform(self):
        if self.constrained is not None:
            raise RuntimeError(
                "an edit whose basis is kept orthonormal (LoReFT, a Rotate that trains) has a gradient along its manifold, "
                "which torch.func and forward-mode differentiation cannot take: use torch.autograd.grad, or NoReFT"
            )
        return self.derive(super().masters())

    def _in_graph(self):
        masters = super().masters()
        if self.constrained is not None:
            basis = masters[self.constrained]
            with torch.no_grad():
                retract_(basis)
            masters[self.constrained] = Tangent.apply(basis)
        return self.derive(masters)

    def _save_to_state_dict(self, *args):
        self.settle()
        super()._save_to_state_dict(*args)

    def _apply(self, fn, recurse=True):
        self.seen, self.kept, self.settled = (), None, None
        return super()._apply(fn, recurse)

    def __setattr__(self, name, value):
        """Forget what was derived from a master that is replaced: fully_shard gathers into one tensor, at one
        version."""
        if isinstance(value, torch.Tensor) and name in self._parameters:
            if self.constrained is not None and laid_out({name: value}):
                raise ValueError(
                    "An edit that brings its basis back to orthonormal rows after each step needs whole masters on each "
                    "process, and fully_shard lays them out over several; train it under DDP"
                )
            self.seen = ()
        super().__setattr__(name, value)


class Derived(Function):
    """From the masters to the derived tensors. The backward is the edit's `pull_back`, on the manifold if it has
    one."""

    @staticmethod
    def forward(ctx, owner, *masters):
        ctx.set_materialize_grads(False)
        ctx.owner, ctx.names = owner, tuple(owner._parameters)
        ctx.save_for_backward(*masters)
        return tuple(None if t is None else t.detach() for t in owner.kept)

    @staticmethod
    def backward(ctx, *grads):  # of operations, so that it can be differentiated
        masters = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        found = ctx.owner.pull_back(masters, grads)
        constrained = ctx.owner.constrained
        if found.get(constrained) is not None:
            found[constrained] = tangent(masters[constrained], found[constrained])
        return None, *(found.get(name) for name in ctx.names)


def masters_of(edit, spot, width, device, tenancy=None):
    """The Masters that an edit needs."""
    kind = Masters if edit.derive is None else DerivedMasters
    return kind(edit, spot, width, device, tenancy)


def as_written(tensor):
    """A context without autocast, whose products would be bf16. On meta there is no autocast."""
    return contextlib.nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def join(members):
    """Let all layers of one edit settle together."""
    group = [m for m in members if isinstance(m, DerivedMasters)]
    for m in group:
        m.group = group


def laid_out(held):
    """Whether any of {name: tensor} is part of a tensor over several processes (a DTensor)."""
    return any(getattr(tensor, "device_mesh", None) is not None for tensor in held.values())


def settle(group):
    """Retract the constrained masters of a group, and derive the tensors that follow from its masters."""
    alike = {}
    for m in group:
        held = Masters.masters(m)
        if laid_out(held):
            continue
        alike.setdefault(tuple((t.shape, t.device) for t in held.values()), []).append((m, held))
    with torch.inference_mode(False), torch.no_grad():
        for members in alike.values():
            _settle(members)


def _settle(members):
    first, held = members[0]
    constrained = first.constrained
    with as_written(first.dial):
        stacked = {name: torch.stack([h[name].detach() for _, h in members]) for name in held}
        if _as_settled(members, stacked):
            return
        if constrained is not None and not first.dial.is_meta:
            stacked[constrained] = retracted(stacked[constrained])
            torch._foreach_copy_([h[constrained] for _, h in members], list(stacked[constrained].unbind()))
        derived = first.derive(stacked)
    own = {id(t): name for name, t in stacked.items()}
    rows = [_kept(place, t, own.get(id(t)), members) for place, t in enumerate(derived)]
    for (m, held), kept in zip(members, zip(*rows, strict=True), strict=True):
        m.kept, m.steps, m.settled = kept, optimizer_steps(), None
        m.seen = tuple((name, t, stamp(t)) for name, t in held.items())
    first.settled = stacked


def _as_settled(members, stacked):
    """Whether the cause of this was an optimizer's step that moved none of the masters.

    Tensors that a backward has saved must not be written again then.
    """
    before = members[0][0].settled
    if before is None or stacked.keys() != before.keys() or any(m.kept is None for m, _ in members):
        return False
    for name, tensor in stacked.items():
        was = before[name]
        if tensor.is_meta or tensor.device != was.device or tensor.shape != was.shape or not torch.equal(tensor, was):
            return False
    for m, held in members:
        m.steps, m.seen = optimizer_steps(), tuple((name, t, stamp(t)) for name, t in held.items())
    return True


def _kept(place, derived, own, members):
    """One of the five tensors for each member: None, the member's master itself, or its slice of `derived`.

    Copied into the last time's slices if they exist, because a CUDA graph may hold their addresses.
    """
    if derived is None:
        return [None] * len(members)
    if own is not None:
        return [held[own] for _, held in members]
    before = [None if m.kept is None else m.kept[place] for m, _ in members]
    if any(t is None or t.shape != derived.shape[1:] or t.device != derived.device for t in before):
        return list(derived.unbind())
    torch._foreach_copy_(before, list(derived.unbind()))
    return before
