"""The ops as registered operators `torch.ops.fastedit.*`: what torch.compile, export and opcheck see.

Schemas, shapes without data (fakes) and one implementation for every device. ops/autograd.py adds autograd. Operators
return tensors only, so an absent output is an empty tensor (0,).
"""

import torch

from ..arguments import NORM_KINDS
from . import implementation

library = torch.library.Library("fastedit", "DEF")

_FORM = "Tensor? scale, Tensor? bias, Tensor? read, Tensor? offset, Tensor? write, Tensor? slot, Tensor? coefficient"
_SEVEN = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
_SCHEMAS = {
    "edit": f"(Tensor hidden, {_FORM}) -> (Tensor, Tensor)",
    "edit_add": f"(Tensor x, Tensor residual, {_FORM}, bool on_sum) -> (Tensor, Tensor)",
    "edit_add_norm": f"(Tensor x, Tensor residual, Tensor? weight, Tensor? norm_bias, {_FORM}, bool on_sum, int kind, "
    "float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "project": "(Tensor hidden, Tensor read, Tensor? offset) -> Tensor",
    "moments": "(Tensor hidden, Tensor? group, int groups) -> (Tensor, Tensor, Tensor)",
    "value_ascent": "(Tensor hidden, Tensor weight, Tensor bias, Tensor? weight2, Tensor? bias2, Tensor head, Tensor gram, "
    "int version, int steps, float step_size) -> Tensor",
    "edit_backward": f"(Tensor? grad, Tensor? hidden, Tensor? residual, {_FORM}, Tensor? grad_z, Tensor? z, "
    f"bool[] needs, ScalarType dtype) -> {_SEVEN}",
    "edit_add_norm_backward": "(Tensor? grad_residual, Tensor? grad_normed, Tensor residual_out, Tensor? x, "
    f"Tensor? residual, Tensor? weight, Tensor? mean, Tensor rstd, {_FORM}, Tensor? grad_z, Tensor? z, "
    "bool on_sum, int kind, bool[] needs, bool[] needs_norm, ScalarType x_dtype, ScalarType residual_dtype) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "project_backward": "(Tensor grad_z, Tensor? hidden, Tensor read, bool[] needs, ScalarType dtype) -> "
    "(Tensor, Tensor, Tensor)",
}


def _absent(like):
    return like.new_empty(0, dtype=torch.float32)


def _filled(tensors, like):
    return tuple(_absent(like) if t is None else t for t in tensors)


def _edit(hidden, scale, bias, read, offset, write, slot, coefficient):
    out, z = implementation.run_edit(hidden, scale, bias, read, offset, write, slot, coefficient, read is not None)
    return _filled((out, z), hidden)


def _edit_add(x, residual, scale, bias, read, offset, write, slot, coefficient, on_sum):
    form = (scale, bias, read, offset, write, slot, coefficient)
    return _filled(implementation.run_edit_add(x, residual, *form, on_sum, read is not None), x)


def _edit_add_norm(
    x, residual, weight, norm_bias, scale, bias, read, offset, write, slot, coefficient, on_sum, kind, eps
):
    form = (scale, bias, read, offset, write, slot, coefficient)
    outputs = implementation.run_edit_add_norm(
        x, residual, weight, norm_bias, *form, on_sum, kind, eps, read is not None, True, True
    )
    return _filled(outputs, x)


def _project(hidden, read, offset):
    return implementation.run_project(hidden, read, offset)


def _moments(hidden, group, groups):
    return implementation.run_moments(hidden, group, groups)


def _value_ascent(hidden, weight, bias, weight2, bias2, head, gram, version, steps, step_size):
    if version not in (-1, version_of(weight)):
        raise RuntimeError(
            "the value net's first weight has changed since its Gram matrix was made, which a compiled function cannot "
            "make anew: call value_net.gram() after each change"
        )
    return implementation.run_value_ascent(hidden, weight, bias, weight2, bias2, head, gram, steps, step_size)


def version_of(tensor):
    """A number that goes up with every change in place. 0 for inference tensors, which have no count."""
    return 0 if tensor.is_inference() else tensor._version


def _edit_backward(*args):
    *tensors, needs, dtype = args
    like = next(t for t in tensors if t is not None)
    return _filled(implementation.run_edit_backward(*tensors, tuple(needs), dtype), like)


def _edit_add_norm_backward(*args):
    *_, on_sum, _, needs, _, x_dtype, residual_dtype = args
    grads = list(implementation.run_edit_add_norm_backward(*args))
    if not needs[0]:
        grads[0] = None
    elif one_gradient(on_sum, needs, x_dtype, residual_dtype):
        grads[1] = None
    return _filled(grads, args[2])


def _project_backward(grad_z, hidden, read, needs, dtype):
    return _filled(implementation.run_project_backward(grad_z, hidden, read, tuple(needs), dtype), grad_z)


def one_gradient(on_sum, needs, x_dtype, residual_dtype):
    """on="sum": x and the residual share one gradient, and an operator may return a tensor only once (here as d_x)."""
    return on_sum and needs[0] and needs[7] and x_dtype == residual_dtype


# --- shapes without data --------------------------------------------------------------------------------------


def _z_like(hidden, read):
    if read is None:
        return _absent(hidden)
    return hidden.new_empty((*hidden.shape[:-1], read.shape[-2]), dtype=torch.float32)


def _fake_edit(hidden, scale, bias, read, offset, write, slot, coefficient):
    return hidden.new_empty(hidden.shape), _z_like(hidden, read)


def _fake_edit_add(x, residual, scale, bias, read, offset, write, slot, coefficient, on_sum):
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty(x.shape, dtype=dtype), _z_like(x, read)


def _fake_edit_add_norm(
    x, residual, weight, norm_bias, scale, bias, read, offset, write, slot, coefficient, on_sum, kind, eps
):
    dtype = torch.promote_types(x.dtype, residual.dtype)
    rows = x.numel() // x.shape[-1]
    statistics = x.new_empty(rows, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    mean = torch.empty_like(statistics) if kind == NORM_KINDS["layer"] else _absent(x)
    out = x.new_empty(x.shape, dtype=dtype)
    return out, torch.empty_like(out), _z_like(x, read), mean, statistics


def _fake_project(hidden, read, offset):
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return hidden.new_empty((*hidden.shape[:-1], read.shape[0]), dtype=dtype)


def _fake_moments(hidden, group, groups):
    mean = hidden.new_empty((groups, hidden.shape[-1]), dtype=torch.float64)
    return hidden.new_empty(groups, dtype=torch.int64), mean, torch.empty_like(mean)


def _fake_value_ascent(hidden, *_):
    return hidden.new_empty(hidden.shape)


def _fake_parameters(parameters, needs, like):
    return tuple(
        torch.empty_like(p, memory_format=torch.contiguous_format) if n else _absent(like)
        for p, n in zip(parameters, needs, strict=True)
    )


def _fake_edit_backward(
    grad, hidden, residual, scale, bias, read, offset, write, slot, coefficient, grad_z, z, needs, dtype
):
    some = next(t for t in (grad, hidden, grad_z) if t is not None)
    width = next(t for t in (grad, hidden, read) if t is not None).shape[-1]
    d_hidden = some.new_empty((*some.shape[:-1], width), dtype=dtype) if needs[0] else _absent(some)
    return d_hidden, *_fake_parameters((scale, bias, read, offset, write, coefficient), needs[1:], some)


def _fake_edit_add_norm_backward(
    grad_residual, grad_normed, residual_out, x, residual, weight, mean, rstd, scale, bias, read, offset, write,
    slot, coefficient, grad_z, z, on_sum, kind, needs, needs_norm, x_dtype, residual_dtype,
):  # fmt: skip
    like = residual_out
    shape = like.shape
    d_x = like.new_empty(shape, dtype=x_dtype) if needs[0] else _absent(like)
    alone = needs[7] and not one_gradient(on_sum, needs, x_dtype, residual_dtype)
    d_residual = like.new_empty(shape, dtype=residual_dtype) if alone else _absent(like)
    d_form = _fake_parameters((scale, bias, read, offset, write, coefficient), needs[1:7], like)
    d_norm = (like.new_empty(like.shape[-1:], dtype=torch.float32) if n else _absent(like) for n in needs_norm)
    return d_x, d_residual, *d_form, *d_norm


def _fake_project_backward(grad_z, hidden, read, needs, dtype):
    d_hidden = grad_z.new_empty((*grad_z.shape[:-1], read.shape[-1]), dtype=dtype) if needs[0] else _absent(grad_z)
    d_read = torch.empty_like(read) if needs[1] else _absent(grad_z)
    return d_hidden, d_read, read.new_empty(read.shape[0]) if needs[2] else _absent(grad_z)


def _register(name, implement, fake):
    library.define(name + _SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    library.impl(name, implement, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastedit::{name}", fake, lib=library)
    return getattr(torch.ops.fastedit, name).default


edit = _register("edit", _edit, _fake_edit)
edit_add = _register("edit_add", _edit_add, _fake_edit_add)
edit_add_norm = _register("edit_add_norm", _edit_add_norm, _fake_edit_add_norm)
project = _register("project", _project, _fake_project)
moments = _register("moments", _moments, _fake_moments)
value_ascent = _register("value_ascent", _value_ascent, _fake_value_ascent)
edit_backward = _register("edit_backward", _edit_backward, _fake_edit_backward)
edit_add_norm_backward = _register("edit_add_norm_backward", _edit_add_norm_backward, _fake_edit_add_norm_backward)
project_backward = _register("project_backward", _project_backward, _fake_project_backward)
