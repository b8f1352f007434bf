"""Checks of arguments that are no arrays, for every face: they import neither torch nor jax."""

import math
import operator
from collections.abc import Iterable

FP32_MAX = 3.4028234663852886e38
MOST_GROUPS = 1 << 20
NORM_KINDS = {"rms": 0, "gemma": 1, "layer": 2}


def as_number(name, value):
    """A float that float32 holds: of a number, a NumPy scalar, or an array or tensor without dimensions.

    Raises:
        ValueError: anything else.
    """
    try:
        scalar = not isinstance(value, (bool, str, bytes)) and not getattr(value, "shape", ())
        number = float(value) if scalar and "bool" not in str(getattr(value, "dtype", "")) else math.nan
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    if not abs(number) <= FP32_MAX:
        raise ValueError(f"{name} is {value!r:.60}, expected a finite number, which float32 holds")
    return number


def check_whole(name, value, least=1):
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 63:
        raise ValueError(f"{name} is {value!r:.60}, expected a whole number from {least} on")


def groups_of(largest):
    """How many groups there are where the largest number says it; one stray number takes no gigabytes."""
    if largest >= MOST_GROUPS:
        raise ValueError(f"group has the number {largest}, expected less than {MOST_GROUPS} where groups= does not say how many")
    return max(largest + 1, 1)


def as_list(name, value, what):
    """What an iterable holds.

    Raises:
        TypeError: no iterable, or one text.
    """
    if isinstance(value, (str, bytes)):
        raise TypeError(f"{name} is one text ({value[:30]!r}), expected {what}")
    if not isinstance(value, Iterable) or getattr(value, "shape", None) == ():
        raise TypeError(f"{name} is {value!r:.60}, expected {what}")
    return list(value)


def as_layers(layers):
    """None, or a tuple of layer numbers and names: of one, of an iterable of them (NumPy's and torch's among them), or of a
    slice, which may end at an open end and is cut to the model's layers when it is patched.

    Raises:
        TypeError, ValueError: anything else, or none at all.
    """
    if layers is None:
        return None
    if isinstance(layers, slice):
        return (layers,)
    one = isinstance(layers, str) or not isinstance(layers, Iterable) or getattr(layers, "shape", None) == ()
    wanted = tuple(_layer(layer) for layer in ((layers,) if one else layers))
    if not wanted:
        raise ValueError("layers is empty: the edit would act nowhere; leave it out for every layer")
    return wanted


def _layer(layer):
    if isinstance(layer, str):
        return str(layer)
    try:
        if isinstance(layer, bool) or "bool" in str(getattr(layer, "dtype", "")):
            raise TypeError
        return operator.index(layer)
    except TypeError:
        raise TypeError(
            f"layers has {layer!r:.60}, expected None, an int, a range, a slice, or a list of ints or layer names"
        ) from None


def check_flag(name, value):
    """True or False as they are."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r:.60}, expected True or False")
    return value


def check_on(on):
    if on not in ("x", "sum"):
        raise ValueError(f"on is {on!r}, expected 'x' (edit x, then add) or 'sum' (add, then edit)")


def check_norm_kind(weight, norm_bias, kind):
    if not isinstance(kind, str) or kind not in NORM_KINDS:
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
        raise ValueError(f"steps is {steps!r:.60}, expected a number of steps from 0 to {(1 << 24) - 1}")
    if not isinstance(step_size, (int, float)) or not abs(step_size) <= FP32_MAX:
        raise ValueError(f"step_size is {step_size!r:.60}, expected a finite number")
