"""The ops as registered operators `torch.ops.fastedit.*`: what torch.compile, export and opcheck see.

There is one implementation for every device. Shapes without data come from the reference itself. ops/autograd.py adds
autograd. Operators return tensors only, so an absent output is an empty tensor (0,).
"""

import torch

from ..arguments import GIVES, SCHEMAS, TAKES
from .dispatch import load
from .running import run

library = torch.library.Library("fastedit", "DEF")


def one_gradient(on_sum, needs, x_dtype, residual_dtype):
    """on="sum": x and the residual share one gradient, and an operator may return a tensor only once (here as d_x)."""
    return on_sum and needs[0] and needs[7] and x_dtype == residual_dtype


def version_of(tensor):
    """A number that goes up with every change in place. 0 for inference tensors, which have no count."""
    return 0 if tensor.is_inference() else tensor._version


def _called(op, args, backend=None):
    """The operator's results: all of run's, none of them None."""
    given = dict(zip(TAKES[op], args, strict=False))
    if "needs" in given:
        args = [tuple(a) if isinstance(a, (list, tuple)) else a for a in args]
    elif "read" in given and op != "project":
        args = (*args, given["read"] is not None, *((True, True) if op == "edit_add_norm" else ()))
    results = run(op, *args, backend=backend)
    if len(GIVES[op]) == 1:
        return results
    if op == "edit_add_norm_backward":
        needs, dtypes = given["needs"], (given["x_dtype"], given["residual_dtype"])
        absent = not needs[0], not needs[7] or one_gradient(given["on_sum"], needs, *dtypes)
        results = [None if gone else r for r, gone in zip(results, (*absent, *[False] * 8), strict=True)]
    like = next(a for a in args if isinstance(a, torch.Tensor))
    return tuple(like.new_empty(0, dtype=torch.float32) if r is None else r for r in results)


def _moments_like(hidden, group, groups):
    mean = hidden.new_empty((groups, hidden.shape[-1]), dtype=torch.float64)
    return hidden.new_empty(groups, dtype=torch.int64), mean, torch.empty_like(mean)


def _ascended_like(hidden, *_):
    return hidden.new_empty(hidden.shape)


def ascend(hidden, weight, bias, weight2, bias2, head, gram, version, steps, step_size):
    """value_ascent. version: the first weight's when its Gram matrix was made, −1 if it is not to be checked."""
    if version not in (-1, version_of(weight)):
        raise RuntimeError(
            "the value net's first weight has changed since its Gram matrix was made, which a compiled function cannot "
            "make again: call value_net.gram() after each change"
        )
    if steps == 0 or hidden.numel() == 0:
        return hidden.clone(memory_format=torch.contiguous_format)
    return run("value_ascent", hidden, weight, bias, weight2, bias2, head, gram, steps, step_size)


def _register(op, implementation=None, fake=None):
    library.define(op + SCHEMAS[op], tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    library.impl(op, implementation or (lambda *args: _called(op, args)), "CompositeExplicitAutograd")
    fake = fake or (lambda *args: _called(op, args, load("reference")))
    torch.library.register_fake(f"fastedit::{op}", fake, lib=library)
    return getattr(torch.ops.fastedit, op).default


OPERATORS = {op: _register(op) for op in SCHEMAS if op not in ("moments", "value_ascent")}
OPERATORS["moments"] = _register("moments", fake=_moments_like)
OPERATORS["value_ascent"] = _register("value_ascent", ascend, _ascended_like)
