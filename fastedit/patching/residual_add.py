"""The residual add of a layer, with the edits and the norm that ride on it, and what it holds ready for the next call.

A forward without gradients is one call of `native.bound`: an op, its arguments, and the facts under which they are
right (whose parameter it is, that there are no hooks, the strength). If a fact no longer holds, the call takes the long
way, which prepares the call again.

Under torch.compile and export a layer's own forward runs, and edits are plain PyTorch after their sites. The compiler
fuses scale, bias and norm with the operations around them. An opaque operator would prevent that: a compiled decode
step of a 64-wide Llama took 0.82 of the unedited eager one's time with operators, and 0.49 with a compiled hook.
Besides, everything that a fused forward looks up would cost the compiler a guard.
"""

import torch
from torch.nn.modules import module as nn_module

from .. import ops
from ..arguments import NORM_KINDS
from ..kernels import reference
from ..ops.native import NOTHING, bound, holds, try_edit_add, try_edit_add_norm
from .rows.tenants import slot_of

NONE = (None,) * 5
NO_GATE = (None, None)
_PLAIN = (torch.nn.Parameter, torch.Tensor)  # not sharded, fake or otherwise wrapped
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_NO_GLOBAL_HOOKS = tuple((nn_module, f"_global{name}", NOTHING) for name in _HOOKS)


def edit(hidden, tensors, strength, looks=None):
    """E(hidden) in an op of its own. tensors, strength and looks as in `add`."""
    strength, gate, rule = _looked(looks, strength, hidden)
    if torch.compiler.is_compiling():
        return _expressed(hidden, tensors, strength)
    return ops.edit(hidden, *tensors, slot=slot_of(tensors, hidden), strength=strength, gate=gate, rule=rule)


def add(x, residual, tensors, strength, on_sum, norm=None, want_residual=True, looks=None):
    """residual + E(x), or if on_sum E(residual + x). With a Norm that fits: (that, its norm).

    tensors: (scale, bias, read, offset, write) of the edit. strength: None, one element, or one per row. looks: None,
        or an
    object with a gate for the kernel (rows/gate_sensors.py). Its gate() is two tensors. Its say(rows) is g, for a
    compiler to see.
    """
    strength, gate, rule = _looked(looks, strength, x, residual, on_sum)
    given = {"on": "sum" if on_sum else "x", "slot": slot_of(tensors, x), "strength": strength, "gate": gate, "rule": rule}
    if norm is None:
        return ops.edit_add(x, residual, *tensors, **given)
    weight, norm_bias = norm.parameters()
    return ops.edit_add_norm(
        x, residual, weight, *tensors, norm_bias=norm_bias, kind=norm.kind, eps=norm.eps, return_residual=want_residual,
        **given,
    )  # fmt: skip


def _expressed(hidden, tensors, strength):
    """The reference's own operations, for a compiler to see. They are fp32 also under autocast."""
    strength = None if strength is None else strength.reshape(-1)
    slot = slot_of(tensors, hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        slot = None if slot is None else slot.reshape(-1)
        out, _ = reference.edit(hidden.reshape(-1, hidden.shape[-1]), *tensors, slot, strength)
    return out.view(hidden.shape)


def _looked(looks, strength, x, residual=None, on_sum=False):
    """(strength, gate, rule). A kernel evaluates the gate itself. A compiler and autograd get the strength times the
    gate.

    The gate sees what the edit is given: x, or the sum in fp32, as in a kernel. A hard gate has no gradient to compute.
    """
    if looks is None:
        return strength, None, None
    learns = torch.is_grad_enabled() and (x.requires_grad or (residual is not None and residual.requires_grad))
    if not (learns or torch.compiler.is_compiling()):
        return strength, *looks.gate()
    if on_sum:
        dtype = torch.promote_types(_sum_dtype(x, residual), torch.float32)
        x = residual.to(dtype) + x.to(dtype)
    said = looks.say(x)
    return said if strength is None else said * strength, None, None


def _sum_dtype(x, residual):
    return x.dtype if x.dtype is residual.dtype else torch.promote_types(x.dtype, residual.dtype)


class Norm:
    """A norm module whose arithmetic the kernel can do: kind "rms", "gemma" or "layer". links: where its owner has it."""

    def __init__(self, module, kind, eps, links=()):
        self.module, self.kind, self.code, self.eps = module, kind, NORM_KINDS[kind], eps
        self.facts = (*links, *((module, name, NOTHING) for name in (*_HOOKS, "forward")))

    def parameters(self):
        """(weight, norm_bias)"""
        held = self.module._parameters
        return held["weight"], held.get("bias")

    def fits(self, x, residual):
        """Whether the module may be skipped in this call, for the norm of residual + x."""
        if not (holds(self.facts) and holds(_NO_GLOBAL_HOOKS)):
            return False
        dtype = _sum_dtype(x, residual)
        for parameter in self.parameters():
            if parameter is not None and (
                parameter.dtype is not dtype or parameter.device != x.device
                or type(parameter) not in _PLAIN or not parameter.is_contiguous()
            ):  # fmt: skip
                return False
        # autocast runs layer_norm in fp32, whatever the dtype it is given
        return self.kind != "layer" or dtype is torch.float32 or not torch.is_autocast_enabled(x.device.type)

    def ready(self):
        """(what the op takes of it, facts) for every call, or None."""
        held, (weight, norm_bias) = self.module._parameters, self.parameters()
        if self.kind == "layer" and (weight is None or weight.dtype is not torch.float32):
            return None  # as autocast has it, call by call
        facts = (*self.facts, *_NO_GLOBAL_HOOKS, (held, "weight", weight), (held, "bias", norm_bias))
        return (weight, norm_bias), facts


class Add:
    """residual' = residual + E(x), then E'(·) of the sum. `x` and `sum` are sites, or None.

    `run` is `add`; the proof puts in its definition.
    """

    run = staticmethod(add)

    def __init__(self, x=None, sum=None):
        self.x, self.sum, self.ready = x, sum, {}
        # a dtype in which an edit does not ride is asked for by the long way
        self.apart = next((s.ride.apart for s in (x, sum) if s is not None and s.ride.apart is not None), None)

    def __getstate__(self):
        return self.__dict__ | {"ready": {}}

    def __call__(self, x, residual, norm=None, want_residual=True):
        """residual'. With a Norm: (residual', its norm).

        The first is None for a residual' that nothing reads, the second for a norm whose module must be called.
        """
        if self.apart is None or x.dtype is not self.apart:
            done = bound(self.ready.get(norm), x, residual)
            if done is not None:
                return done
        if norm is not None and not norm.fits(x, residual):
            return self(x, residual), None
        before, stage, on_sum, after = self._riding(x, residual)
        for one in before:
            x = one.apply(x)
        given = None if stage is None else stage.arguments(x)
        tensors, strength, looks = (NONE, None, None) if given is None else (*given, stage.looks)
        here = None if after else norm
        if given is None and here is None:
            out = residual + x
        else:
            out = self.run(x, residual, tensors, strength, on_sum, here, want_residual, looks)
        if not (before or after or torch.is_grad_enabled()):
            self._make_ready(stage, on_sum, norm, want_residual)
        for one in after:
            out = one.apply(out)
        return (out, None) if after and norm is not None else out

    def _riding(self, x, residual):
        """(stages before the add, the stage that rides on it or None, whether on the sum, stages after it)."""
        first, last = self.x, self.sum
        before = first.stages if first is not None and first.ride.now(x.dtype) else ()  # else its own module has applied it
        after = last.stages if last is not None and last.ride.now(_sum_dtype(x, residual)) else ()
        if after and after[0].on_sum:
            return before, after[0], True, after[1:]
        if before and before[-1].on_x:
            return before[:-1], before[-1], False, after
        return before, None, False, after

    def _make_ready(self, stage, on_sum, norm, want_residual):
        if self.run is not add or (stage is not None and not hasattr(stage, "standing")):
            return
        standing = ((None,) * 8, ()) if stage is None else stage.standing()
        normed = ((), ()) if norm is None else norm.ready()
        if standing is None or normed is None:
            return
        (*tensors, strength, gate, rule), facts = standing
        for site in (self.x, self.sum):
            if site is not None:
                facts += (site, "stages", site.stages), *site.ride.facts
        held, more = normed
        if norm is None:
            op, arguments = try_edit_add, (*tensors, None, strength, on_sum, False, gate, rule)
        else:
            op = try_edit_add_norm
            arguments = (*held, *tensors, None, strength, on_sum, norm.code, norm.eps, False, want_residual, False)
            arguments += gate, rule
        if holds(facts + more):  # else what was found here is an exception, which may pass
            self.ready[norm] = op, arguments, facts + more, torch.is_inference_mode_enabled()
