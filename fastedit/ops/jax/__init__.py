"""The kernels as JAX functions: `edit`, `edit_add`, `edit_add_norm`, `project`; no torch.

They work under `jax.jit`, `jax.grad` and `jax.vmap`, on CPUs and, if fastedit was built with a CUDA compiler, on NVIDIA
GPUs. Rows are float32, bfloat16 or float16. Edit parameters are float32. Formulas, arguments and results are those of
`fastedit.ops`. A wrong shape or dtype fails while the function is traced.

    import jax
    from fastedit import jax as fej
    step = jax.jit(jax.grad(lambda bias, x, residual: fej.edit_add(x, residual, bias=bias).sum()))

A `slot` out of range raises on the CPU when the call runs. On a GPU such a row is left alone. Under vmap, calls whose
batched arguments are rows run once over the whole batch. Calls with batched parameters, and backwards that return
parameter gradients, run once per element. XLA does not split these calls over devices (docs/frameworks.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

try:
    import jax.numpy as jnp
except ImportError as error:
    raise ImportError(f"fastedit.jax needs JAX 0.8 or newer ({error}): pip install 'jax>=0.8'") from error
try:
    from ... import _native  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"fastedit.jax needs the native kernels, which this install lacks ({error}); see `fastedit doctor`"
    ) from error

from ...arguments import NORM_KINDS, check_norm_kind, check_on, check_projection
from . import functions
from .checks import as_form, as_parameter, as_read, as_residual, as_rows

if TYPE_CHECKING:
    from jax import Array
    from jax.typing import ArrayLike
Result: TypeAlias = "Array | Any"  # a tuple with return_projection

__all__ = ["edit", "edit_add", "edit_add_norm", "project"]


def edit(
    hidden: ArrayLike, scale: ArrayLike | None = None, bias: ArrayLike | None = None, read: ArrayLike | None = None,
    offset: ArrayLike | None = None, write: ArrayLike | None = None, *, slot: ArrayLike | None = None,
    strength: ArrayLike | None = None, return_projection: bool = False,
) -> Result:  # fmt: skip
    """h' = h + k · ((scale − 1) ⊙ h + bias + (h @ readᵀ + offset) @ write), as `fastedit.ops.edit`.

    Args:
        hidden: (…, width), float32, bfloat16 or float16.
        scale, bias: (width,) float32, or None for 1 and 0.
        read, write: (rank, width) float32, rank 1 to 64; both or neither. offset: (rank,) float32 or None.
        slot: int32, one per row (hidden.shape[:-1]). Parameters then have a leading slot dimension, and row i uses
            parameters[slot[i]]. −1 leaves the row's bits as they are.
        strength: k. A number, a float32 array of one element, or float32, one per row. 0 leaves the row's bits.
        return_projection: also return z = h @ readᵀ + offset, (…, rank) float32.

    Returns:
        h' in hidden's shape and dtype, or (h', z). Differentiable once, in reverse mode, by every float argument.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, while tracing.
        jax.errors.JaxRuntimeError: a slot out of range, on the CPU, when the call runs.
    """
    hidden = as_rows(hidden, "hidden")
    form = as_form(hidden, scale, bias, read, offset, write, slot, strength)
    check_projection(return_projection, read)
    if not hidden.size:
        out, z = hidden, _empty_projection(hidden, form.read, form.offset, form.slot)
    else:
        out, z = functions.edit(bool(return_projection), hidden, form)
    return (out, z) if return_projection else out


def edit_add(
    x: ArrayLike, residual: ArrayLike, scale: ArrayLike | None = None, bias: ArrayLike | None = None,
    read: ArrayLike | None = None, offset: ArrayLike | None = None, write: ArrayLike | None = None, *,
    on: Literal["x", "sum"] = "x", slot: ArrayLike | None = None, strength: ArrayLike | None = None,
    return_projection: bool = False,
) -> Result:  # fmt: skip
    """residual + E(x) (on="x") or E(residual + x) (on="sum"), as `fastedit.ops.edit_add`.

    x and residual (…, width) share a dtype, or x is bfloat16 and residual float32 (on="x"). scale, bias, read, offset,
    write, slot, strength, return_projection: as `edit`.
    Returns residual' in residual's dtype, or (residual', z).
    """
    x, residual, form = _add(x, residual, scale, bias, read, offset, write, on, slot, strength, return_projection)
    if not x.size:
        out, z = residual, _empty_projection(x, form.read, form.offset, form.slot)
    else:
        out, z = functions.edit_add((on == "sum", bool(return_projection)), x, residual, form)
    return (out, z) if return_projection else out


def edit_add_norm(
    x: ArrayLike, residual: ArrayLike, weight: ArrayLike | None = None, scale: ArrayLike | None = None,
    bias: ArrayLike | None = None, read: ArrayLike | None = None, offset: ArrayLike | None = None,
    write: ArrayLike | None = None, *, norm_bias: ArrayLike | None = None,
    kind: Literal["rms", "gemma", "layer"] = "rms", eps: float = 1e-6, on: Literal["x", "sum"] = "x",
    slot: ArrayLike | None = None, strength: ArrayLike | None = None, return_projection: bool = False,
    return_residual: bool = True,
) -> tuple[Result, ...]:  # fmt: skip
    """(residual', normed): edit_add, then a norm of the stored residual', as `fastedit.ops.edit_add_norm`.

    weight and norm_bias (width,) in the residual's dtype. kind is "rms", "gemma" or "layer" (then weight may be None,
    and norm_bias may be given). eps is a Python number. return_residual=False returns None in place of residual', and
    stores it only if a gradient is taken. With return_projection: (residual', normed, z). x, residual, on, scale, bias,
    read, offset, write, slot, strength: as `edit_add`.
    """
    check_norm_kind(weight, norm_bias, kind)
    x, residual, form = _add(x, residual, scale, bias, read, offset, write, on, slot, strength, return_projection)
    width, dtype = residual.shape[-1:], residual.dtype
    weight, norm_bias = (
        as_parameter(p, name, width, dtype) for name, p in (("weight", weight), ("norm_bias", norm_bias))
    )
    if not x.size:
        out = normed = residual
        z = _empty_projection(x, form.read, form.offset, form.slot)
    else:
        static = functions.Norm(
            on == "sum", NORM_KINDS[kind], float(eps), bool(return_residual), bool(return_projection)
        )
        out, normed, z = functions.edit_add_norm(static, x, residual, weight, norm_bias, form)
    out = out if return_residual else None
    return (out, normed, z) if return_projection else (out, normed)


def project(hidden: ArrayLike, read: ArrayLike, offset: ArrayLike | None = None) -> Array:
    """z = hidden @ readᵀ + offset, (…, rank) float32, as `fastedit.ops.project`.

    hidden (…, width); read (rank, width) float32, rank 1 to 64; offset (rank,) float32 or None. A wrong dtype or shape
    raises TypeError or ValueError while tracing.
    """
    hidden = as_rows(hidden, "hidden")
    rank = as_read(read).shape[-2]
    read = as_parameter(read, "read", (rank, hidden.shape[-1]))
    offset = as_parameter(offset, "offset", (rank,))
    if not hidden.size:
        return _empty_projection(hidden, read, offset)
    return functions.project(hidden, read, offset)


def _add(x, residual, scale, bias, read, offset, write, on, slot, strength, return_projection):
    """(x, residual, Form), checked."""
    check_on(on)
    x = as_rows(x, "x")
    residual = as_residual(residual, x, on)
    form = as_form(x, scale, bias, read, offset, write, slot, strength)
    check_projection(return_projection, read)
    return x, residual, form


def _empty_projection(rows, read, offset, slot=None):
    """z if there is nothing to read: rows without columns project to their offset, untouched rows to 0."""
    if read is None:
        return None
    z = jnp.zeros((*rows.shape[:-1], read.shape[-2]), jnp.float32)
    if offset is None or not z.size:
        return z
    return z + offset if slot is None else jnp.where(slot[..., None] < 0, z, offset[jnp.maximum(slot, 0)])
