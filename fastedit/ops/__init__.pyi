# What ops/__init__.py loads on first use, with types; tests/pages/test_types.py compares the two.

from collections.abc import Sequence
from typing import Literal, overload

from torch import Tensor

from .value_net import ValueNet

@overload
def edit(
    hidden: Tensor,
    scale: Tensor | None = None, bias: Tensor | None = None, read: Tensor | None = None, offset: Tensor | None = None,
    write: Tensor | None = None, *,
    slot: Tensor | None = None, strength: float | Tensor | None = None,
    gate: Tensor | None = None, rule: Tensor | None = None,
    return_projection: Literal[False] = False,
) -> Tensor: ...
@overload
def edit(
    hidden: Tensor,
    scale: Tensor | None = None, bias: Tensor | None = None, read: Tensor | None = None, offset: Tensor | None = None,
    write: Tensor | None = None, *,
    slot: Tensor | None = None, strength: float | Tensor | None = None,
    gate: Tensor | None = None, rule: Tensor | None = None,
    return_projection: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def edit_add(
    x: Tensor, residual: Tensor,
    scale: Tensor | None = None, bias: Tensor | None = None, read: Tensor | None = None, offset: Tensor | None = None,
    write: Tensor | None = None, *,
    on: Literal["x", "sum"] = "x", slot: Tensor | None = None, strength: float | Tensor | None = None,
    gate: Tensor | None = None, rule: Tensor | None = None,
    return_projection: Literal[False] = False,
) -> Tensor: ...
@overload
def edit_add(
    x: Tensor, residual: Tensor,
    scale: Tensor | None = None, bias: Tensor | None = None, read: Tensor | None = None, offset: Tensor | None = None,
    write: Tensor | None = None, *,
    on: Literal["x", "sum"] = "x", slot: Tensor | None = None, strength: float | Tensor | None = None,
    gate: Tensor | None = None, rule: Tensor | None = None,
    return_projection: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def edit_add_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None,
    scale: Tensor | None = None, bias: Tensor | None = None, read: Tensor | None = None, offset: Tensor | None = None,
    write: Tensor | None = None, *,
    norm_bias: Tensor | None = None, kind: Literal["rms", "gemma", "layer"] = "rms", eps: float = 1e-6,
    on: Literal["x", "sum"] = "x", slot: Tensor | None = None, strength: float | Tensor | None = None,
    gate: Tensor | None = None, rule: Tensor | None = None,
    return_residual: bool = True, return_projection: Literal[False] = False,
) -> tuple[Tensor, Tensor]: ...
@overload
def edit_add_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None,
    scale: Tensor | None = None, bias: Tensor | None = None, read: Tensor | None = None, offset: Tensor | None = None,
    write: Tensor | None = None, *,
    norm_bias: Tensor | None = None, kind: Literal["rms", "gemma", "layer"] = "rms", eps: float = 1e-6,
    on: Literal["x", "sum"] = "x", slot: Tensor | None = None, strength: float | Tensor | None = None,
    gate: Tensor | None = None, rule: Tensor | None = None,
    return_residual: bool = True, return_projection: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...
def project(hidden: Tensor, read: Tensor, offset: Tensor | None = None) -> Tensor: ...
def moments(
    hidden: Tensor, group: Tensor | None = None, mask: Tensor | None = None, groups: int | None = None
) -> tuple[Tensor, Tensor, Tensor]: ...
def value_ascent(
    hidden: Tensor, value_net: ValueNet, steps: int, step_size: float, target: float | Sequence[float] | None = None
) -> Tensor: ...
