"""Argument checks of the JAX face, from shapes and dtypes alone. A wrong call fails while it is traced."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ... import _native

ROW_DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}  # the codes of kernels/abi.h
FP32 = jnp.dtype(jnp.float32)


class Form(NamedTuple):
    """The normal form's parameters, absent ones None. Also used for their gradients, or for which of these are
    wanted."""

    scale: Any = None
    bias: Any = None
    read: Any = None
    offset: Any = None
    write: Any = None
    slot: Any = None
    strength: Any = None


def as_array(value, name):
    if isinstance(value, jax.Array):
        return value
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} is {type(value).__name__}, expected a JAX or NumPy array ({error})") from error


def as_rows(value, name):
    array = as_array(value, name)
    if array.dtype.name not in ROW_DTYPES:
        raise TypeError(f"{name} has dtype {array.dtype.name}, expected one of {', '.join(ROW_DTYPES)}")
    if array.ndim == 0:
        raise ValueError(f"{name} is a single number, expected hidden states of shape (…, width)")
    return array


def as_residual(value, x, on):
    residual = as_rows(value, "residual")
    if residual.shape != x.shape:
        raise ValueError(f"residual has shape {residual.shape} and x {x.shape}, expected the same shape")
    mixed = (x.dtype, residual.dtype) == (jnp.bfloat16, jnp.float32) and on == "x"
    if residual.dtype != x.dtype and not mixed:
        raise TypeError(
            f"residual is {residual.dtype.name} and x {x.dtype.name} under on={on!r}, expected one dtype, or bfloat16 "
            f"x on a float32 residual with on='x'; use x.astype(residual.dtype)"
        )
    return residual


def as_parameter(value, name, shape, dtype=FP32):
    """The array, which must have exactly this shape and dtype. None stays None."""
    if value is None:
        return None
    array = as_array(value, name)
    found, wanted = f"{array.dtype.name} {array.shape}", f"{dtype.name} {tuple(shape)}"
    if array.shape != tuple(shape):
        raise ValueError(f"{name} is {found}, expected {wanted}")
    if array.dtype != dtype:
        raise TypeError(f"{name} is {found}, expected {wanted}; use {name}.astype({dtype.name!r})")
    return array


def as_read(value, slots=()):
    array = as_array(value, "read")
    rank = array.shape[-2] if array.ndim >= 2 else 0
    if not 1 <= rank <= _native.MAX_RANK:
        behind = " behind the slot dimension" if slots else ""
        raise ValueError(
            f"read has shape {array.shape}, expected (rank, width) with rank 1 to {_native.MAX_RANK}{behind}"
        )
    return array


def as_form(rows, scale, bias, read, offset, write, slot, strength):
    """The checked Form of an edit of `rows` (…, width)."""
    width, slots, rank = rows.shape[-1], (), 0
    if slot is not None:
        some = next((p for p in (scale, bias, read) if p is not None), None)
        slots = () if some is None else as_array(some, "scale").shape[:1]
        if not slots or slots[0] == 0:
            raise ValueError("slot is given, so the parameters need a leading slot dimension, e.g. (slots, width)")
    if (read is None) != (write is None) or (offset is not None and read is None):
        raise ValueError("read, offset and write belong together: read and write are both needed (offset may be None)")
    if read is not None:
        rank = as_read(read, slots).shape[-2]
    return Form(
        as_parameter(scale, "scale", (*slots, width)),
        as_parameter(bias, "bias", (*slots, width)),
        as_parameter(read, "read", (*slots, rank, width)),
        as_parameter(offset, "offset", (*slots, rank)),
        as_parameter(write, "write", (*slots, rank, width)),
        as_parameter(slot, "slot", rows.shape[:-1], jnp.dtype(jnp.int32)),
        _as_strength(strength, rows.shape[:-1]),
    )


def _as_strength(strength, lead):
    """None (1 for every row), (1,) or one number per row."""
    if strength is None or (isinstance(strength, (int, float)) and strength == 1.0):
        return None
    if isinstance(strength, (int, float)):
        return jnp.full((1,), strength, jnp.float32)
    array = as_array(strength, "strength")
    if array.size == 1 and array.ndim <= 1:
        return as_parameter(array, "strength", array.shape).reshape(1)
    return as_parameter(array, "strength", lead)
