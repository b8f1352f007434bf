"""The adds of patched layers, with as little Python as there can be: in decoding the host is the bottleneck.

The kernels are those of fastedit.ops. One row of width 64 on the CPU, µs: edit_add 13 through ops, 8 here;
with the norm 17 and 11. Only calls that need no gradient and are not traced go straight to the native
module: contiguous rows of one dtype, no slots, no projection returned. Anything else goes to fastedit.ops.
"""

import torch

from . import ops
from .dispatch import select
from .native import DTYPE

_Tensor, _fp32 = torch.Tensor, torch.float32
_PLAIN = (torch.nn.Parameter, torch.Tensor)
_grad_enabled, _compiling, _empty_like = torch.is_grad_enabled, torch.compiler.is_compiling, torch.empty_like
_native_ops = {}  # (is_cuda, dtype) → (edit_add, edit_add_norm, dtype code), or None: another backend serves


def _find(x):
    name = select(x.device.type, x.dtype, x.dtype).__name__ if not x.is_meta else "reference"
    found = None
    if name in ("cpu", "cuda"):
        from . import _native

        found = (
            getattr(_native, f"{name}_edit_add"),
            getattr(_native, f"{name}_edit_add_norm"),
            DTYPE[x.dtype],
        )
    _native_ops[x.is_cuda, x.dtype] = found
    return found


def add(x, residual, tensors, strength, on_sum, norm=None, want_residual=True):
    """residual + E(x), or where on_sum E(residual + x); with a Norm (adds.py) that fits, (that, its norm).

    tensors: (scale, bias, read, offset, write) of the edit. strength: None or one element. Shapes have been
    checked when the masters were made; dtypes and devices are checked here, as a model may have been moved.
    """
    if _grad_enabled() or _compiling() or type(x) is not _Tensor or type(residual) is not _Tensor:
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
    pointers, rank = [], 0
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
            return _checked(x, residual, tensors, strength, on_sum, norm, want_residual)
    if pointers[2]:
        rank = tensors[2].shape[0]
    scale, bias, read, offset, write, coefficient = pointers
    add_kernel, norm_kernel, code = native
    width = shape[-1]
    out = _empty_like(residual) if want_residual else None
    arguments = (  # EditAddArgs of kernels/abi.h, field by field
        x.numel() // width, width, scale, bias, read, offset, write, rank, 1, 0, coefficient, 0, code, code,
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


def _checked(x, residual, tensors, strength, on_sum, norm, want_residual):
    on = "sum" if on_sum else "x"
    if norm is None:
        return ops.edit_add(x, residual, *tensors, on=on, strength=strength)
    weight, norm_bias = norm.parameters()
    return ops.edit_add_norm(
        x, residual, weight, *tensors, norm_bias=norm_bias, kind=norm.kind, eps=norm.eps, on=on,
        strength=strength, return_residual=want_residual,
    )  # fmt: skip
