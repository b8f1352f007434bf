"""Argument checks of the ops: metadata only, cheap enough for every call, all before anything runs."""

import torch

from .arguments import check_norm_kind, check_steps, groups_of
from .value_net import ValueNet

MAX_RANK = 64
_ROW_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))


def check_tensor(value, name):
    """A dense torch.Tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"{name} is {value!r:.60}, a {type(value).__name__}, expected a torch.Tensor; fastedit.arrays takes NumPy's arrays"
        )
    if value.layout is not torch.strided:
        raise TypeError(f"{name} has the layout {value.layout}, expected a dense tensor; use {name}.to_dense()")


def check_rows(rows, name):
    check_tensor(rows, name)
    if rows.dtype not in _ROW_DTYPES:
        raise TypeError(f"{name} has dtype {rows.dtype}, expected float32, bfloat16, float16 or float64")
    if rows.dim() == 0:
        raise ValueError(f"{name} is a single number, expected hidden states of shape (…, width)")


def check_same_rows(x, residual):
    check_rows(residual, "residual")
    if x.shape != residual.shape:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and residual {tuple(residual.shape)}, expected the same shape"
        )
    if x.device != residual.device:
        raise ValueError(f"x is on {x.device} and residual on {residual.device}, expected the same device")


def _check_parameter(name, parameter, shape, hidden):
    check_tensor(parameter, name)
    if parameter.shape != shape:
        wanted = f"({', '.join(map(str, shape))})"
        raise ValueError(
            f"{name} has shape {tuple(parameter.shape)}, expected {wanted} for hidden states {hidden.shape[-1]} wide"
        )
    _check_placement(name, parameter, hidden)


def _check_placement(name, parameter, hidden):
    if parameter.dtype is not torch.float32 and not (
        parameter.dtype is torch.float64 and hidden.dtype is torch.float64
    ):
        raise TypeError(
            f"{name} has dtype {parameter.dtype}, expected float32: edit parameters are fp32 masters whatever "
            f"the hidden states' dtype (in bf16, 1 ± 1e-3 rounds back to 1); use {name}.float()"
        )
    if parameter.device != hidden.device:
        raise ValueError(
            f"{name} is on {parameter.device} and the hidden states on {hidden.device}; move one with .to()"
        )


def check_form(hidden, scale, bias, read, offset, write, slot, coefficient, read_only=False):
    """Shapes, dtypes and devices of the normal form against hidden (…, width)."""
    width = hidden.shape[-1]
    lead = ()
    if slot is not None:
        _check_per_row("slot", slot, hidden, torch.int32)
        some = next((p for p in (scale, bias, read) if p is not None), None)
        if some is None or _dim(some) < 2:
            raise ValueError("slot is given, so the parameters need a leading slot dimension, e.g. scale (slots, width)")
        lead = some.shape[:1]
        if lead[0] == 0:
            raise ValueError("slot is given, but the parameters hold no slots (leading dimension 0), expected one or more")
    if scale is not None:
        _check_parameter("scale", scale, (*lead, width), hidden)
    if bias is not None:
        _check_parameter("bias", bias, (*lead, width), hidden)
    if read is None and write is None and offset is None:
        pass
    elif read is None or (write is None and not read_only):
        missing = "read" if read is None else "write"
        raise ValueError(f"read, offset and write belong together: {missing} is None (offset alone may be)")
    else:
        check_tensor(read, "read")
        rank = read.shape[-2] if read.dim() >= 2 else 0
        if not 1 <= rank <= MAX_RANK:
            raise ValueError(
                f"read has shape {tuple(read.shape)}, expected (rank, width) with rank 1 to {MAX_RANK}"
                + (" behind the slot dimension" if lead else "")
            )
        _check_parameter("read", read, (*lead, rank, width), hidden)
        if write is not None:
            _check_parameter("write", write, (*lead, rank, width), hidden)
        if offset is not None:
            _check_parameter("offset", offset, (*lead, rank), hidden)
    if coefficient is not None:
        check_tensor(coefficient, "strength")
        if coefficient.numel() == 1 and coefficient.dim() <= 1:
            _check_placement("strength", coefficient, hidden)
        else:
            _check_per_row("strength", coefficient, hidden, None)
            _check_placement("strength", coefficient, hidden)


def check_gate(hidden, gate, rule, scale, bias, read, slot):
    """A gate and its rule against hidden (…, width) and a form that was found right."""
    if gate is None or rule is None:
        missing, given = ("rule", "gate") if rule is None else ("gate", "rule")
        raise ValueError(
            f"{given} is given without {missing}: a gate takes gate (width,) and rule (3,) = (threshold, sharpness or 0 for "
            "a hard gate, 1 for the cosine else 0)"
        )
    lead = () if slot is None else next(p.shape[:1] for p in (scale, bias, read) if p is not None)
    _check_parameter("gate", gate, (*lead, hidden.shape[-1]), hidden)
    check_tensor(rule, "rule")
    if rule.shape != (*lead, 3):
        raise ValueError(
            f"rule has shape {tuple(rule.shape)}, expected {(*lead, 3)}: threshold, sharpness or 0 for a hard gate, 1 for the "
            "cosine else 0" + (", for each slot" if lead else "")
        )
    _check_placement("rule", rule, hidden)


def _dim(tensor):
    return tensor.dim() if isinstance(tensor, torch.Tensor) else 0


def _check_per_row(name, tensor, hidden, dtype):
    check_tensor(tensor, name)
    if tensor.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, expected one number a row: {tuple(hidden.shape[:-1])}"
            + (", or a single number" if name == "strength" else "")
        )
    if dtype is not None and tensor.dtype != dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected {dtype}; use {name}.int()")
    if tensor.device != hidden.device:
        raise ValueError(f"{name} is on {tensor.device} and the hidden states on {hidden.device}; move one with .to()")


def check_norm(x, weight, norm_bias, kind):
    width = x.shape[-1:]
    for name, parameter in (("weight", weight), ("norm_bias", norm_bias)):
        if parameter is not None:
            check_tensor(parameter, name)
        if parameter is not None and parameter.shape != width:
            raise ValueError(f"{name} has shape {tuple(parameter.shape)}, expected ({width[0]},) as the rows' width")
    check_norm_kind(weight, norm_bias, kind)


def check_group(hidden, group, mask, groups, traced):
    """The number of groups, once group and mask are found to be one a row of hidden."""
    if mask is not None:
        _check_per_row("mask", mask, hidden, torch.bool)
    if groups is not None and (not isinstance(groups, (int, torch.SymInt)) or groups < 1):
        raise ValueError(f"groups is {groups!r}, expected a number of groups from 1 on")
    if group is None:
        return 1 if groups is None else groups
    _check_per_row("group", group, hidden, torch.int32)
    if traced:
        if groups is None:
            raise ValueError("groups is None: under torch.compile and export the number of groups must be given")
        return groups
    if groups is not None and not group.is_cpu:
        return groups
    largest = int(group.max()) if group.numel() else -1
    if groups is not None and largest >= groups:
        raise IndexError(f"group has the number {largest}, expected −1 (left out) or 0 to {groups - 1}")
    return groups or groups_of(largest)


def check_ascent(hidden, value_net, steps, step_size):
    if not isinstance(value_net, ValueNet):
        raise TypeError(
            f"value_net is {type(value_net).__name__}, expected a fastedit.ValueNet; ValueNet.from_sequential takes an "
            "nn.Sequential of Linear and ReLU"
        )
    if hidden.shape[-1] != value_net.width:
        raise ValueError(f"hidden is {hidden.shape[-1]} wide, and the value net reads {value_net.width}")
    if hidden.device != value_net.weight.device:
        raise ValueError(
            f"hidden is on {hidden.device} and the value net on {value_net.weight.device}; move one with .to()"
        )
    check_steps(steps, step_size)
