"""Limits of the kernels, and checks of arguments that are not arrays. They import neither torch nor jax."""

import math
import operator
from collections.abc import Iterable

FP32_MAX = 3.4028234663852886e38
MAX_RANK = 64  # of an edit: what the kernels keep of a row in registers
MOST_GROUPS = 1 << 20
MOST_SLOTS = 1 << 31  # a row's slot is an int32
NORM_KINDS = {"rms": 0, "gemma": 1, "layer": 2}

# Every op by the names of its arguments and results: the schema of its operator under torch.compile, and what the faces and
# backends call it with. A result that is absent is None, and an empty tensor from an operator.
_FORM = "Tensor? scale, Tensor? bias, Tensor? read, Tensor? offset, Tensor? write, Tensor? slot, Tensor? coefficient"
_D_FORM = "Tensor d_scale, Tensor d_bias, Tensor d_read, Tensor d_offset, Tensor d_write, Tensor d_coefficient"
SCHEMAS = {
    "edit": f"(Tensor hidden, {_FORM}) -> (Tensor out, Tensor z)",
    "edit_add": f"(Tensor x, Tensor residual, {_FORM}, bool on_sum) -> (Tensor out, Tensor z)",
    "edit_add_norm": f"(Tensor x, Tensor residual, Tensor? weight, Tensor? norm_bias, {_FORM}, bool on_sum, int kind, "
    "float eps) -> (Tensor out, Tensor normed, Tensor z, Tensor mean, Tensor rstd)",
    "project": "(Tensor hidden, Tensor read, Tensor? offset) -> Tensor z",
    "moments": "(Tensor hidden, Tensor? group, int groups) -> (Tensor count, Tensor mean, Tensor m2)",
    "value_ascent": "(Tensor hidden, Tensor weight, Tensor bias, Tensor? weight2, Tensor? bias2, Tensor head, Tensor gram, "
    "int version, int steps, float step_size) -> Tensor out",
    "edit_backward": f"(Tensor? grad, Tensor? hidden, Tensor? residual, {_FORM}, Tensor? grad_z, Tensor? z, bool[] needs, "
    f"ScalarType dtype) -> (Tensor d_hidden, {_D_FORM})",
    "edit_add_norm_backward": "(Tensor? grad_residual, Tensor? grad_normed, Tensor residual_out, Tensor? x, "
    f"Tensor? residual, Tensor? weight, Tensor? mean, Tensor rstd, {_FORM}, Tensor? grad_z, Tensor? z, bool on_sum, int kind, "
    "bool[] needs, bool[] needs_norm, ScalarType x_dtype, ScalarType residual_dtype) -> "
    f"(Tensor d_x, Tensor d_residual, {_D_FORM}, Tensor d_weight, Tensor d_norm_bias)",
    "project_backward": "(Tensor grad_z, Tensor? hidden, Tensor read, bool[] needs, ScalarType dtype) -> "
    "(Tensor d_hidden, Tensor d_read, Tensor d_offset)",
}  # fmt: skip
_MORE = {  # what an operator does not have: results that are wanted, a gate for the kernel
    "edit": ("want_z", "gate", "rule"), "edit_add": ("want_z", "gate", "rule"),
    "edit_add_norm": ("want_z", "want_residual", "want_stats", "gate", "rule"),
}  # fmt: skip


def _names(part):
    names = (word.strip("()").split()[-1] for word in part.split(", "))
    return tuple(name for name in names if name != "version")  # of a compiled function's weight: the operator's alone


TAKES = {op: _names(schema.split(" -> ")[0]) + _MORE.get(op, ()) for op, schema in SCHEMAS.items()}
GIVES = {op: _names(schema.split(" -> ")[1]) for op, schema in SCHEMAS.items()}


def as_number(name, value):
    """The value as a float that float32 holds. Takes a number, a NumPy scalar, or an array or tensor without dimensions.

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
    """None, or a tuple of layer numbers and names.

    Takes one number or name, an iterable of them (also NumPy's and torch's), or a slice. A slice may have an open end
    and is cut to the model's layers when the model is patched.

    Raises:
        TypeError, ValueError: anything else, or no layer at all.
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


def as_flag(name, value):
    """bool(value), for flags. TypeError for a text, and for an array of several numbers or of none."""
    if isinstance(value, str):
        raise TypeError(f"{name} is {value!r:.60}, expected True or False")
    try:
        return bool(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} is {value!r:.60}, expected True or False") from None


def check_flag(name, value):
    """True or False as they are."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r:.60}, expected True or False")
    return value


def check_on(on):
    if on not in ("x", "sum"):
        raise ValueError(f"on is {on!r}, expected 'x' (edit x, then add) or 'sum' (add, then edit)")


def check_norm_kind(weight, norm_bias, kind):
    """kind: its name, or the kernels' number for it."""
    kind = next((name for name, number in NORM_KINDS.items() if number is kind), kind)
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


def check_target(value_net, target):
    """A net of several outputs has a target, one finite number for each output."""
    if target is None:
        if value_net.outputs > 1:
            raise ValueError(
                f"the value net has {value_net.outputs} outputs: give target=, a number for each, or value_net.mixed(weights)"
            )
        return
    numbers = target if isinstance(target, (list, tuple)) else [target]
    if len(numbers) != value_net.outputs or any(
        isinstance(n, bool) or not isinstance(n, (int, float)) or not math.isfinite(n) for n in numbers
    ):
        raise ValueError(f"target is {target!r}, expected a finite number for each of {value_net.outputs} output(s)")


def layers_of_text(text):
    """The numbers of "8-15", "3" or "0,4,-1", as a person writes layers. ValueError for what is none."""
    numbers = []
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-") if not part.strip().startswith("-") else (part, "", "")
            if dash and int(last) < int(first):
                raise ValueError
            numbers += range(int(first), int(last) + 1) if dash else [int(first)]
    except ValueError:
        raise ValueError(f"layers is {text!r}, expected numbers such as 3, 8-15 or 0,4,-1") from None
    if not numbers:
        raise ValueError(f"layers is {text!r}, which names no layer")
    return numbers
