"""Argument checks of the ops: what a call that no native kernel answered is told, before anything runs.

From metadata alone, but for slots in host memory. The native module has checks of its own, for every call, of the same kind.
"""

import torch

from ..arguments import MAX_RANK, as_number, check_norm_kind, check_projection, check_steps, check_target, groups_of
from .value_net import ValueNet

_ROW_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_SHAPES = {  # of the parameters, behind the slots
    "scale": ("width",), "bias": ("width",), "read": ("rank", "width"), "offset": ("rank",), "write": ("rank", "width"),
    "gate": ("width",),
}  # fmt: skip


def check(op, given):
    """An op's arguments {name: value}: dtypes, shapes and devices, and that what belongs together is there.

    Raises:
        TypeError, ValueError: with what was expected and what was found. IndexError: a slot out of range, on the host.
    """
    name = "x" if "x" in given else "hidden"
    rows = given[name]
    _check_rows(rows, name)
    if "x" in given:
        _check_same_rows(rows, given["residual"])
    if "write" in given or op == "project":
        _check_form(rows, given, op == "project")
        check_projection(given.get("want_z"), given["read"])
    if "kind" in given:
        _check_norm(rows, given)


def check_tensor(value, name):
    """A dense torch.Tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"{name} is {value!r:.60}, a {type(value).__name__}, expected a torch.Tensor; fastedit.arrays takes NumPy's arrays"
        )
    if value.layout is not torch.strided:
        raise TypeError(f"{name} has the layout {value.layout}, expected a dense tensor; use {name}.to_dense()")


def _check_rows(rows, name):
    check_tensor(rows, name)
    if rows.dtype not in _ROW_DTYPES:
        raise TypeError(f"{name} has dtype {rows.dtype}, expected float32, bfloat16, float16 or float64")
    if rows.dim() == 0:
        raise ValueError(f"{name} is a single number, expected hidden states of shape (…, width)")


def _check_same_rows(x, residual):
    _check_rows(residual, "residual")
    if x.shape != residual.shape:
        raise ValueError(f"x has shape {tuple(x.shape)} and residual {tuple(residual.shape)}, expected the same shape")
    if x.device != residual.device:
        raise ValueError(f"x is on {x.device} and residual on {residual.device}, expected the same device")


def _check_form(hidden, given, read_only):
    """The normal form, its strength and gate, against hidden (…, width)."""
    scale, bias, read, offset, write, slot = (given.get(n) for n in ("scale", "bias", "read", "offset", "write", "slot"))
    lead = () if slot is None else _slots(hidden, slot, scale, bias, read)
    sizes = {"width": hidden.shape[-1], "rank": 0}
    if (read is None and (write is not None or offset is not None)) or (read is not None and write is None and not read_only):
        missing = "read" if read is None else "write"
        raise ValueError(f"read, offset and write belong together: {missing} is None (offset alone may be)")
    if read is not None or read_only:
        check_tensor(read, "read")
        sizes["rank"] = read.shape[-2] if read.dim() >= 2 else 0
        if not 1 <= sizes["rank"] <= MAX_RANK:
            raise ValueError(
                f"read has shape {tuple(read.shape)}, expected (rank, width) with rank 1 to {MAX_RANK}"
                + (" behind the slot dimension" if lead else "")
            )
    gate, rule = given.get("gate"), given.get("rule")
    if (gate is None) != (rule is None):
        missing, there = ("rule", "gate") if rule is None else ("gate", "rule")
        raise ValueError(
            f"{there} is given without {missing}: a gate takes gate (width,) and rule (3,) = (threshold, sharpness or 0 for "
            "a hard gate, 1 for the cosine else 0)"
        )
    for name, dims in _SHAPES.items():
        if given.get(name) is not None:
            _check_parameter(name, given[name], (*lead, *(sizes[d] for d in dims)), hidden)
    if rule is not None:
        check_tensor(rule, "rule")
        if rule.shape != (*lead, 3):
            raise ValueError(
                f"rule has shape {tuple(rule.shape)}, expected {(*lead, 3)}: threshold, sharpness or 0 for a hard gate, 1 for "
                "the cosine else 0" + (", for each slot" if lead else "")
            )
        _check_placement("rule", rule, hidden)
    strength = given.get("coefficient")
    if strength is not None:
        check_tensor(strength, "strength")
        if strength.numel() != 1 or strength.dim() > 1:
            _check_per_row("strength", strength, hidden, None)
        _check_placement("strength", strength, hidden)


def _slots(hidden, slot, *parameters):
    """(slots,), once slot is found to be one a row and, where looking stalls nothing, in range."""
    _check_per_row("slot", slot, hidden, torch.int32)
    some = next((p for p in parameters if p is not None), None)
    if not isinstance(some, torch.Tensor) or some.dim() < 2:
        raise ValueError("slot is given, so the parameters need a leading slot dimension, e.g. scale (slots, width)")
    slots = some.shape[0]
    if slots == 0:
        raise ValueError("slot is given, but the parameters hold no slots (leading dimension 0), expected one or more")
    if slot.is_cpu and type(slot) in (torch.Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling():
        wrong = ((slot < -1) | (slot >= slots)).reshape(-1).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise IndexError(
                f"slot of row {row} is {int(slot.reshape(-1)[row])}, expected -1 (untouched) or 0 to {slots - 1}"
            )
    return (slots,)


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


def _check_per_row(name, tensor, hidden, dtype):
    check_tensor(tensor, name)
    if tensor.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, expected one number per row: {tuple(hidden.shape[:-1])}"
            + (", or a single number" if name == "strength" else "")
        )
    if dtype is not None and tensor.dtype != dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected {dtype}; use {name}.int()")
    if tensor.device != hidden.device:
        raise ValueError(f"{name} is on {tensor.device} and the hidden states on {hidden.device}; move one with .to()")


def _check_norm(x, given):
    residual = torch.promote_types(x.dtype, given["residual"].dtype)
    for name in ("weight", "norm_bias"):
        parameter = given[name]
        if parameter is None:
            continue
        check_tensor(parameter, name)
        if parameter.shape != x.shape[-1:]:
            raise ValueError(f"{name} has shape {tuple(parameter.shape)}, expected ({x.shape[-1]},) as the rows' width")
        if parameter.dtype != residual:
            raise TypeError(f"the norm's {name} has dtype {parameter.dtype} and the residual {residual}, expected the same dtype")
        if parameter.device != x.device:
            raise ValueError(f"the norm's {name} is on {parameter.device} and x on {x.device}; move one with .to()")
    check_norm_kind(given["weight"], given["norm_bias"], given["kind"])
    if type(given["eps"]) is not float:
        as_number("eps", given["eps"])


def check_group(hidden, group, mask, groups, traced):
    """The number of groups, once group and mask are found to be one a row of hidden."""
    _check_rows(hidden, "hidden")
    if mask is not None:
        _check_per_row("mask", mask, hidden, torch.bool)
    if groups is not None and (not isinstance(groups, (int, torch.SymInt)) or groups < 1):
        raise ValueError(f"groups is {groups!r}, expected a number of groups from 1 on")
    if type(groups) is int and groups >= 2**31:
        raise ValueError(f"groups is {str(groups)[:30]}, expected less than 2^31")
    if group is None:
        return 1 if groups is None else groups
    _check_per_row("group", group, hidden, torch.int32)
    if traced:
        if groups is None:
            raise ValueError("groups is None: under torch.compile and export the number of groups must be given")
        return groups
    if groups is not None and not group.is_cpu:
        return groups
    if group.is_meta:
        raise ValueError("groups is None: a group on meta has no numbers, so pass groups=")
    largest = int(group.max()) if group.numel() else -1
    if groups is not None and largest >= groups:
        raise IndexError(f"group has the number {largest}, expected −1 (left out) or 0 to {groups - 1}")
    return groups or groups_of(largest)


def check_ascent(hidden, value_net, steps, step_size, target=None):
    _check_rows(hidden, "hidden")
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
    check_target(value_net, target)
    check_steps(steps, step_size)
