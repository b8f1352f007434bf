"""Derivatives of the JAX face: each op as a `jax.custom_vjp` over the native forward and backward.

Symbolic zeros are on: JAX tells the forward which arguments are differentiated, and the backward which results have a
gradient. So only what is asked for is computed, and bias-only training saves no hidden states. Formulas:
docs/design.md, 4. Differentiable once, in reverse mode; JAX refuses jvp.
"""

import dataclasses
import functools

import jax
from jax.custom_derivatives import SymbolicZero

from . import native
from .checks import Form


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which gradients the forward was told of. It has no leaves, so it may be among the saved arrays."""

    rows: tuple
    form: Form
    others: tuple = ()

    def reads_hidden(self, form):
        wanted = self.form
        return wanted.scale or wanted.read or (wanted.strength and form.scale is not None)

    def reads_z(self, form):
        return form.read is not None and (self.form.write or self.form.strength)


def _split(primals):
    """(values, whether each is differentiated), None for None."""
    there = [p for p in primals if p is not None]
    values, flags = iter([p.value for p in there]), iter([bool(p.perturbed) for p in there])
    return (
        [None if p is None else next(values) for p in primals],
        tuple(False if p is None else next(flags) for p in primals),
    )  # fmt: skip


def _split_form(form):
    values, flags = _split(form)
    return Form(*values), Form(*flags)


def _given(gradient):
    """None if the result has no gradient."""
    return None if gradient is None or type(gradient) is SymbolicZero else gradient


# --- edit -----------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def edit(want_z, hidden, form):
    return native.edit(hidden, form, want_z)


def _edit_forward(want_z, hidden, form):
    (hidden,), rows = _split((hidden,))
    form, flags = _split_form(form)
    wanted = Wanted(rows, flags)
    out, z = native.edit(hidden, form, want_z or wanted.reads_z(form))
    saved = (
        hidden if wanted.reads_hidden(form) else None, form, z if wanted.reads_z(form) else None, wanted,
    )  # fmt: skip
    return (out, z if want_z else None), saved


def _edit_backward(want_z, saved, gradients):
    hidden, form, z, wanted = saved
    shape, dtype = gradients[0].shape, gradients[0].dtype
    grad, grad_z = map(_given, gradients)
    if grad is None and grad_z is None:
        return None, Form()
    return native.edit_backward(grad, hidden, None, form, grad_z, z, *wanted.rows, wanted.form, shape, dtype)


edit.defvjp(_edit_forward, _edit_backward, symbolic_zeros=True)


# --- edit_add -------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def edit_add(static, x, residual, form):
    on_sum, want_z = static
    return native.edit_add(x, residual, form, on_sum, want_z)


def _edit_add_forward(static, x, residual, form):
    on_sum, want_z = static
    (x, residual), rows = _split((x, residual))
    form, flags = _split_form(form)
    wanted = Wanted(rows, flags)
    out, z = native.edit_add(x, residual, form, on_sum, want_z or wanted.reads_z(form))
    reads = wanted.reads_hidden(form)
    saved = (
        x if reads else None, residual if reads and on_sum else None, form, z if wanted.reads_z(form) else None,
        wanted, _Dtype(x.dtype),
    )  # fmt: skip
    return (out, z if want_z else None), saved


def _edit_add_backward(static, saved, gradients):
    on_sum, _ = static
    x, residual, form, z, wanted, x_dtype = saved
    want_x, want_residual = wanted.rows
    shape = gradients[0].shape
    grad, grad_z = map(_given, gradients)
    if grad is None and grad_z is None:
        return None, None, Form()
    d_rows, d_form = native.edit_backward(
        grad, x, residual, form, grad_z, z, want_x or (on_sum and want_residual), wanted.form, shape, x_dtype.dtype
    )
    d_residual = d_rows if on_sum else grad
    return d_rows if want_x else None, d_residual if want_residual else None, d_form


edit_add.defvjp(_edit_add_forward, _edit_add_backward, symbolic_zeros=True)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Dtype:
    dtype: object


# --- edit_add_norm --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Norm:
    """The part of edit_add_norm that is fixed when it is traced."""

    on_sum: bool
    kind: int
    eps: float
    want_out: bool
    want_z: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def edit_add_norm(static, x, residual, weight, norm_bias, form):
    out, normed, z, _, _ = native.edit_add_norm(
        x, residual, weight, norm_bias, form, static.on_sum, static.kind, static.eps, static.want_out,
        static.want_z, False,
    )  # fmt: skip
    return out, normed, z


def _edit_add_norm_forward(static, x, residual, weight, norm_bias, form):
    (x, residual, weight, norm_bias), flags = _split((x, residual, weight, norm_bias))
    form, form_flags = _split_form(form)
    wanted = Wanted(flags[:2], form_flags, flags[2:])
    reads, reads_z = wanted.reads_hidden(form), wanted.reads_z(form)
    out, normed, z, mean, rstd = native.edit_add_norm(
        x, residual, weight, norm_bias, form, static.on_sum, static.kind, static.eps, True,
        static.want_z or reads_z, True,
    )  # fmt: skip
    saved = (
        out, x if reads else None, residual if reads and static.on_sum else None, weight, mean, rstd, form,
        z if reads_z else None, wanted, _Dtype(x.dtype),
    )  # fmt: skip
    return (out if static.want_out else None, normed, z if static.want_z else None), saved


def _edit_add_norm_backward(static, saved, gradients):
    out, x, residual, weight, mean, rstd, form, z, wanted, x_dtype = saved
    grad_residual, grad_normed, grad_z = map(_given, gradients)
    if grad_residual is None and grad_normed is None and grad_z is None:
        return None, None, None, None, Form()
    want_norm = [flag and grad_normed is not None for flag in wanted.others]
    d_x, d_residual, d_form, d_weight, d_norm_bias = native.edit_add_norm_backward(
        grad_residual, grad_normed, out, x, residual, weight, mean, rstd, form, grad_z, z, static.on_sum,
        static.kind, *wanted.rows, wanted.form, *want_norm, x_dtype.dtype,
    )  # fmt: skip
    d_weight, d_norm_bias = (None if d is None else d.astype(out.dtype) for d in (d_weight, d_norm_bias))
    return d_x, d_residual, d_weight, d_norm_bias, d_form


edit_add_norm.defvjp(_edit_add_norm_forward, _edit_add_norm_backward, symbolic_zeros=True)


# --- project --------------------------------------------------------------------------------------------------


@jax.custom_vjp
def project(hidden, read, offset):
    return native.project(hidden, read, offset)


def _project_forward(hidden, read, offset):
    (hidden, read, offset), flags = _split((hidden, read, offset))
    saved = (hidden if flags[1] else None, read, Wanted(flags, Form()), _Dtype(hidden.dtype))
    return native.project(hidden, read, offset), saved


def _project_backward(saved, grad_z):
    hidden, read, wanted, dtype = saved
    if _given(grad_z) is None:
        return None, None, None
    shape = (*grad_z.shape[:-1], read.shape[-1])
    return native.project_backward(grad_z, hidden, read, *wanted.rows, shape, dtype.dtype)


project.defvjp(_project_forward, _project_backward, symbolic_zeros=True)
