"""The edits and adds of patched layers: the native call if nothing has to see it, else fastedit.ops.

Under torch.compile, export and the transforms of torch.func a patched layer is plain PyTorch instead. The compiler then
fuses scale, bias and norm with the operations around them. An opaque operator would prevent that: a compiled decode
step of a 64-wide Llama took 0.82 of the unedited eager one's time with operators, and 0.49 with a compiled hook.
"""

import torch
from torch.compiler import is_dynamo_compiling

from .. import ops
from ..kernels import reference
from ..ops.native import try_edit, try_edit_add, try_edit_add_norm
from ..ops.parameter_changes import transformed
from .rows.tenants import slot_of

_NO_GATE = (None, None)


def edit(hidden, tensors, strength, looks=None):
    """E(hidden) in an op of its own. tensors, strength and looks as in `add`."""
    if not is_dynamo_compiling():
        slot = slot_of(tensors, hidden)
        gate = _NO_GATE if looks is None else looks.gate()
        done = try_edit(hidden, *tensors, slot, strength, False, *gate)
        if done is not None:
            return done[0]
        if not (torch.compiler.is_compiling() or transformed()):  # export traces with tensors of its own
            if looks is not None and torch.is_grad_enabled() and hidden.requires_grad:
                strength, gate = _looked(looks, hidden, strength), _NO_GATE
            gate, rule = gate
            return ops.edit(hidden, *tensors, slot=slot, strength=strength, gate=gate, rule=rule)
    return _expressed(reference.edit, (hidden,), tensors, _looked(looks, hidden, strength))


def add(x, residual, tensors, strength, on_sum, norm=None, want_residual=True, looks=None):
    """residual + E(x), or if on_sum E(residual + x). With a Norm (patching/residual_add.py) that fits: (that, its
    norm).

    tensors: (scale, bias, read, offset, write) of the edit. strength: None, one element, or one per row. looks: None,
    or an object with a gate for the kernel (gate_sensors.Sensor). Its gate() is two tensors. Its say(rows) is g, for
    when no kernel takes the gate.
    """
    if not is_dynamo_compiling():
        slot = None if type(tensors) is tuple else slot_of(tensors, x)
        gate = _NO_GATE if looks is None else looks.gate()
        if norm is None:
            done = try_edit_add(x, residual, *tensors, slot, strength, on_sum, False, *gate)
            if done is not None:
                return done[0]
        else:
            held = norm.module._parameters
            done = try_edit_add_norm(
                x, residual, held["weight"], held.get("bias"), *tensors, slot, strength, on_sum, norm.code, norm.eps,
                False, want_residual, False, *gate,
            )  # fmt: skip
            if done is not None:
                return done[:2]
        if not (torch.compiler.is_compiling() or transformed()):
            return _seen(x, residual, tensors, slot, strength, on_sum, norm, want_residual, looks, gate)
    strength = _looked(looks, x, strength, residual if on_sum else None)
    out = _expressed(reference.edit_add, (x, residual), tensors, strength, on_sum)
    return out if norm is None else (out, norm.module(out))


def _seen(x, residual, tensors, slot, strength, on_sum, norm, want_residual, looks, gate):
    """`add` through fastedit.ops: visible to autograd, or refused with a reason."""
    if looks is not None and torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad):
        strength, gate = _looked(looks, x, strength, residual if on_sum else None), _NO_GATE
    gate, rule = gate
    given = {"on": "sum" if on_sum else "x", "slot": slot, "strength": strength, "gate": gate, "rule": rule}
    if norm is None:
        return ops.edit_add(x, residual, *tensors, **given)
    weight, norm_bias = norm.parameters()
    return ops.edit_add_norm(
        x, residual, weight, *tensors, norm_bias=norm_bias, kind=norm.kind, eps=norm.eps, return_residual=want_residual,
        **given,
    )  # fmt: skip


def _expressed(op, streams, tensors, strength, *more):
    """The reference's own operations, for a compiler or a transform to see. They are fp32 also under autocast."""
    strength = None if strength is None else strength.reshape(-1)
    with torch.autocast(streams[0].device.type, enabled=False):
        slot = slot_of(tensors, streams[0])
        slot = None if slot is None else slot.reshape(-1)
        out, _ = op(*(s.reshape(-1, s.shape[-1]) for s in streams), *tensors, slot, strength, *more)
    return out.view(streams[0].shape)


def _looked(looks, x, strength, residual=None):
    """The strength times the gate. The gate sees what the edit is given: x, or the sum in fp32, as in a kernel."""
    if looks is None:
        return strength
    if residual is not None:
        dtype = torch.promote_types(torch.promote_types(x.dtype, residual.dtype), torch.float32)
        x = residual.to(dtype) + x.to(dtype)
    said = looks.say(x)
    return said if strength is None else said * strength
