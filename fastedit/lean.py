"""The edits and adds of patched layers, with as little Python as there can be: in decoding the host is the bottleneck.

The kernels are those of fastedit.ops; bench/host.py measures both ways. Only calls that need no gradient and are not
traced go straight to the native module: contiguous rows of one dtype, no projection returned. Anything else goes to
fastedit.ops.

Under torch.compile and export a patched layer is plain PyTorch instead: the compiler fuses scale, bias and norm into
what stands around them, where an operator it cannot see into would hold it up (a compiled decode step of a 64-wide
Llama took 0.82 of the unedited eager one's time with operators, 0.49 under a compiled hook).
"""

import torch

from . import ops
from .dispatch import select
from .kernels import reference
from .native import DTYPE
from .tenants import slot_of

_Tensor, _fp32 = torch.Tensor, torch.float32
_PLAIN = (torch.nn.Parameter, torch.Tensor)
_grad_enabled, _compiling, _empty_like = torch.is_grad_enabled, torch.compiler.is_compiling, torch.empty_like
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


def _arguments(tensors, slot, strength, device, width):
    """The form as the kernels take it (kernels/abi.h): addresses, 0 for None, and the numbers between them.

    None where a tensor is not a plain fp32 one on this device, or the edit is of another width. `slot` is as
    tenants.spread makes it.
    """
    first = tensors[0]
    if first is None:
        first = tensors[2] if tensors[1] is None else tensors[1]
    if first is not None and first.shape[-1] != width:
        return None
    pointers = []
    for tensor in (*tensors, strength):
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
    scale, bias, read, offset, write, coefficient = pointers
    slots, slot = (1, 0) if slot is None else (first.shape[0], slot.data_ptr())
    return (
        scale, bias, read, offset, write, tensors[2].shape[-2] if read else 0, slots, slot,
        coefficient, 0 if strength is None or strength.numel() == 1 else 1,
    )  # fmt: skip


def edit(hidden, tensors, strength):
    """E(hidden) in an op of its own; tensors and strength as `add` has them."""
    if _compiling():
        return _expressed(reference.edit, (hidden,), tensors, strength)
    slot = slot_of(tensors, hidden)
    if _grad_enabled() or type(hidden) is not _Tensor:
        return ops.edit(hidden, *tensors, slot=slot, strength=strength)
    device, cuda = hidden.device, hidden.is_cuda
    native = _native_ops.get((cuda, hidden.dtype), False)
    if native is False:
        native = _find(hidden)
    if native is None or not hidden.is_contiguous() or (cuda and device.index != torch.cuda.current_device()):
        return ops.edit(hidden, *tensors, slot=slot, strength=strength)
    width = hidden.shape[-1]
    form = _arguments(tensors, slot, strength, device, width)
    if form is None:
        return ops.edit(hidden, *tensors, slot=slot, strength=strength)
    out = _empty_like(hidden)
    native[0](  # EditArgs of kernels/abi.h, field by field
        hidden.numel() // width, width, *form, native[3], hidden.data_ptr(), width, out.data_ptr(), 0,
        torch.cuda.current_stream().cuda_stream if cuda else 0,
    )  # fmt: skip
    return out


def add(x, residual, tensors, strength, on_sum, norm=None, want_residual=True):
    """residual + E(x), or where on_sum E(residual + x); with a Norm (adds.py) that fits, (that, its norm).

    tensors: (scale, bias, read, offset, write) of the edit. strength: None, one element, or one a row. Shapes have been
    checked when the masters were made; dtypes and devices are checked here, as a model may have been moved.
    """
    if _compiling():
        out = _expressed(reference.edit_add, (x, residual), tensors, strength, on_sum)
        return out if norm is None else (out, norm.module(out))
    if _grad_enabled() or type(x) is not _Tensor or type(residual) is not _Tensor:
        return _checked(x, residual, tensors, strength, on_sum, norm, want_residual)
    dtype, device, shape, cuda = x.dtype, x.device, x.shape, x.is_cuda
    native = _native_ops.get((cuda, dtype), False)
    if native is False:
        native = _find(x)
    if (
        native is None or residual.dtype is not dtype or residual.shape != shape or residual.device != device
        or not x.is_contiguous() or not residual.is_contiguous()
        or (cuda and device.index != torch.cuda.current_device())
    ):  # fmt: skip
        return _checked(x, residual, tensors, strength, on_sum, norm, want_residual)
    form = _arguments(tensors, slot_of(tensors, x), strength, device, shape[-1])
    if form is None:
        return _checked(x, residual, tensors, strength, on_sum, norm, want_residual)
    _, add_kernel, norm_kernel, code = native
    width = shape[-1]
    out = _empty_like(residual) if want_residual else None
    arguments = (  # EditAddArgs of kernels/abi.h, field by field
        x.numel() // width, width, *form, code, code,
        x.data_ptr(), width, residual.data_ptr(), width, 0 if out is None else out.data_ptr(), 0, on_sum,
    )  # fmt: skip
    stream = torch.cuda.current_stream().cuda_stream if cuda else 0
    if norm is None:
        add_kernel(*arguments, stream)
        return out
    weight, norm_bias = norm.parameters()
    normed = _empty_like(residual)
    norm_kernel(
        *arguments, norm.code, norm.eps, 0 if weight is None else weight.data_ptr(),
        0 if norm_bias is None else norm_bias.data_ptr(), normed.data_ptr(), 0, 0, stream,
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


def _checked(x, residual, tensors, strength, on_sum, norm, want_residual):
    on = "sum" if on_sum else "x"
    slot = slot_of(tensors, x)
    if norm is None:
        return ops.edit_add(x, residual, *tensors, on=on, slot=slot, strength=strength)
    weight, norm_bias = norm.parameters()
    return ops.edit_add_norm(
        x, residual, weight, *tensors, norm_bias=norm_bias, kind=norm.kind, eps=norm.eps, on=on,
        slot=slot, strength=strength, return_residual=want_residual,
    )  # fmt: skip
