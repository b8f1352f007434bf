"""Checks of arguments that are no arrays, for every face: they import neither torch nor jax."""

import math

NORM_KINDS = {"rms": 0, "gemma": 1, "layer": 2}


def check_on(on):
    if on not in ("x", "sum"):
        raise ValueError(f"on is {on!r}, expected 'x' (edit x, then add) or 'sum' (add, then edit)")


def check_norm_kind(weight, norm_bias, kind):
    if kind not in NORM_KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(map(repr, NORM_KINDS))}")
    if weight is None and kind != "layer":
        raise ValueError(f"kind={kind!r} needs the norm's weight; found weight=None")
    if norm_bias is not None and kind != "layer":
        raise ValueError(f"norm_bias belongs to kind='layer'; found kind={kind!r}")


def check_projection(wanted, read):
    if wanted and read is None:
        raise ValueError("return_projection=True needs `read`, the directions to project on; found read=None")


def check_steps(steps, step_size):
    """steps below 2^24, where fp32 still counts."""
    if not isinstance(steps, int) or isinstance(steps, bool) or not 0 <= steps < 1 << 24:
        raise ValueError(f"steps is {steps!r}, expected a number of steps from 0 to {(1 << 24) - 1}")
    if not isinstance(step_size, (int, float)) or not math.isfinite(step_size):
        raise ValueError(f"step_size is {step_size!r}, expected a finite number")
