"""The edits and adds of patched layers, with as little Python as there can be: in decoding the host is the bottleneck.

The kernels are those of fastedit.ops; bench/host.py measures both ways. Only calls that need no gradient and are not
traced go straight to the native module: contiguous rows of one dtype, no projection returned. Anything else goes to
fastedit.ops.

Under torch.compile and export a patched layer is plain PyTorch instead: the compiler fuses scale, bias and norm into
what stands around them, where an operator it cannot see into would hold it up (a compiled decode step of a 64-wide
Llama took 0.82 of the unedited eager one's time with operators, 0.49 under a compiled hook).
"""

import torch
from torch.autograd import forward_ad

from . import ops
from .dispatch import select
from .kernels import reference
from .native import DTYPE
from .tenants import slot_of

_Tensor, _fp32 = torch.Tensor, torch.float32
_PLAIN = (torch.nn.Parameter, torch.Tensor)
_grad_enabled, _compiling, _empty_like = torch.is_grad_enabled, torch.compiler.is_compiling, torch.empty_like
_transforms = torch._C._are_functorch_transforms_active
_native_ops = {}  # (is_cuda, dtype) → (edit, edit_add, edit_add_norm, dtype code), or None: another backend serves


def _find(x):
    name = select(x.device.type, x.dtype, x.dtype).__name__ if not x.is_meta else "reference"
    found = None
    if name in ("cpu", "cuda"):
        from . import _native

        found = (
            getattr(_native, f"{name}_edit"),
            getattr(_native, f"{name}_edit_add"),
            getattr(_native, f"{name}_edit_add_norm"),
            DTYPE[x.dtype],
        )
    _native_ops[x.is_cuda, x.dtype] = found
    return found


def _arguments(tensors, slot, strength, gate, device, width):
    """The form as the kernels take it (kernels/abi.h): addresses, 0 for None, and the numbers between them; and what a
    gate puts behind all other arguments.

    None where a tensor is not a plain fp32 one on this device, or the edit is of another width. `slot` is as
    tenants.spread makes it.
    """
    first = tensors[0]
    if first is None:
        first = tensors[2] if tensors[1] is None else tensors[1]
    if (first is not None and first.shape[-1] != width) or (gate is not None and gate[0].shape[-1] != width):
        return None
    pointers = []
    for tensor in (*tensors, strength) if gate is None else (*tensors, strength, *gate):
        if tensor is None:
            pointers.append(0)
        elif (
            tensor.dtype is _fp32
            and tensor.device == device
            and type(tensor) in _PLAIN
            and tensor.is_contiguous()
        ):
            pointers.append(tensor.data_ptr())
        else:
            return None
    scale, bias, read, offset, write, coefficient, *gate = pointers
    slots, slot = (1, 0) if slot is None else (first.shape[0], slot.data_ptr())
    form = (
        scale, bias, read, offset, write, tensors[2].shape[-2] if read else 0, slots, slot,
        coefficient, 0 if strength is None or strength.numel() == 1 else 1,
    )  # fmt: skip
    return form, gate


def edit(hidden, tensors, strength, looks=None):
    """E(hidden) in an op of its own; tensors, strength and looks as `add` has them."""
    if _compiling() or _transforms() or forward_ad._current_level >= 0:  # changes.transformed, without a call
        strength = _looked(looks, hidden, strength)
        return _expressed(reference.edit, (hidden,), tensors, strength)
    slot = slot_of(tensors, hidden)
    if _grad_enabled() or type(hidden) is not _Tensor:
        return _checked_edit(hidden, tensors, slot, strength, looks)
    device, cuda = hidden.device, hidden.is_cuda
    native = _native_ops.get((cuda, hidden.dtype), False)
    if native is False:
        native = _find(hidden)
    if native is None or not hidden.is_contiguous() or (cuda and device.index != torch.cuda.current_device()):
        return _checked_edit(hidden, tensors, slot, strength, looks)
    width = hidden.shape[-1]
    given = _arguments(tensors, slot, strength, None if looks is None else looks.gate(), device, width)
    if given is None:
        return _checked_edit(hidden, tensors, slot, strength, looks)
    form, gate = given
    out = _empty_like(hidden)
    native[0](  # EditArgs of kernels/abi.h, field by field
        hidden.numel() // width, width, *form, native[3], hidden.data_ptr(), width, out.data_ptr(), 0, *gate,
        torch.cuda.current_stream().cuda_stream if cuda else 0,
    )  # fmt: skip
    return out


def add(x, residual, tensors, strength, on_sum, norm=None, want_residual=True, looks=None):
    """residual + E(x), or where on_sum E(residual + x); with a Norm (adds.py) that fits, (that, its norm).

    tensors: (scale, bias, read, offset, write) of the edit. strength: None, one element, or one a row. looks: None, or what
    has a gate for the kernel: gate() is its two tensors, say(rows) its g where no kernel takes it (gating.Sensor). Shapes
    have been checked when the masters were made; dtypes and devices are checked here, as a model may have been moved.
    """
    if _compiling() or _transforms() or forward_ad._current_level >= 0:  # changes.transformed, without a call
        strength = _looked(looks, x, strength, residual if on_sum else None)
        out = _expressed(reference.edit_add, (x, residual), tensors, strength, on_sum)
        return out if norm is None else (out, norm.module(out))
    if _grad_enabled() or type(x) is not _Tensor or type(residual) is not _Tensor:
        return _checked(x, residual, tensors, strength, on_sum, norm, want_residual, looks)
    dtype, device, shape, cuda = x.dtype, x.device, x.shape, x.is_cuda
    native = _native_ops.get((cuda, dtype), False)
    if native is False:
        native = _find(x)
    if (
        native is None or residual.dtype is not dtype or residual.shape != shape or residual.device != device
        or not x.is_contiguous() or not residual.is_contiguous()
        or (cuda and device.index != torch.cuda.current_device())
    ):  # fmt: skip
        return _checked(x, residual, tensors, strength, on_sum, norm, want_residual, looks)
    given = _arguments(tensors, slot_of(tensors, x), strength, None if looks is None else looks.gate(), device, shape[-1])
    if given is None:
        return _checked(x, residual, tensors, strength, on_sum, norm, want_residual, looks)
    (form, gate), (_, add_kernel, norm_kernel, code) = given, native
    width = shape[-1]
    out = _empty_like(residual) if want_residual else None
    arguments = (  # EditAddArgs of kernels/abi.h, field by field
        x.numel() // width, width, *form, code, code,
        x.data_ptr(), width, residual.data_ptr(), width, 0 if out is None else out.data_ptr(), 0, on_sum,
    )  # fmt: skip
    stream = torch.cuda.current_stream().cuda_stream if cuda else 0
    if norm is None:
        add_kernel(*arguments, *gate, stream)
        return out
    weight, norm_bias = norm.parameters()
    normed = _empty_like(residual)
    norm_kernel(
        *arguments, norm.code, norm.eps, 0 if weight is None else weight.data_ptr(),
        0 if norm_bias is None else norm_bias.data_ptr(), normed.data_ptr(), 0, 0, *gate, stream,
    )  # fmt: skip
    return out, normed


def _expressed(op, streams, tensors, strength, *more):
    """The reference's own operations, for a compiler to see; fp32 also under autocast."""
    strength = None if strength is None else strength.reshape(-1)
    with torch.autocast(streams[0].device.type, enabled=False):
        slot = slot_of(tensors, streams[0])
        slot = None if slot is None else slot.reshape(-1)
        out, _ = op(*(s.reshape(-1, s.shape[-1]) for s in streams), *tensors, slot, strength, *more)
    return out.view(streams[0].shape)


def _looked(looks, x, strength, residual=None):
    """The strength with a gate's part in it, made of what the edit is given: x, or the sum as a kernel has it, in fp32."""
    if looks is None:
        return strength
    if residual is not None:
        dtype = torch.promote_types(torch.promote_types(x.dtype, residual.dtype), _fp32)
        x = residual.to(dtype) + x.to(dtype)
    said = looks.say(x)
    return said if strength is None else said * strength


def _checked_edit(hidden, tensors, slot, strength, looks):
    gate = rule = None
    if looks is not None:
        if _grad_enabled() and hidden.requires_grad:
            strength = _looked(looks, hidden, strength)
        else:
            gate, rule = looks.gate()
    return ops.edit(hidden, *tensors, slot=slot, strength=strength, gate=gate, rule=rule)


def _checked(x, residual, tensors, strength, on_sum, norm, want_residual, looks):
    on = "sum" if on_sum else "x"
    gate = rule = None
    if looks is not None:
        if _grad_enabled() and (x.requires_grad or residual.requires_grad):
            strength = _looked(looks, x, strength, residual if on_sum else None)
        else:
            gate, rule = looks.gate()
    given = {"on": on, "slot": slot_of(tensors, x), "strength": strength, "gate": gate, "rule": rule}
    if norm is None:
        return ops.edit_add(x, residual, *tensors, **given)
    weight, norm_bias = norm.parameters()
    return ops.edit_add_norm(
        x, residual, weight, *tensors, norm_bias=norm_bias, kind=norm.kind, eps=norm.eps, return_residual=want_residual,
        **given,
    )  # fmt: skip
