"""An op on whichever backend serves it. The eager functions, autograd and the registered operators run this.

The native module is asked first. If it declines, the arguments are checked and laid out as every backend takes them:
(rows, width) with a unit inner stride, a view wherever strides allow one. The results get the callers' shapes again.
"""

import math

import torch

from ..arguments import GIVES, TAKES
from .checks import check
from .dispatch import load, select
from .native import ASKED

_ROWS = {"hidden", "x", "residual", "grad", "grad_residual", "grad_normed", "residual_out", "grad_z", "z"}
_RESULT_ROWS = {"out", "normed", "z", "d_hidden", "d_x", "d_residual"}
_ONE_A_ROW = {"slot", "coefficient", "group"}
MAX_DIMS = 16  # that the native module takes (csrc/tensors.h)
PLAIN = (torch.Tensor, torch.nn.Parameter)


def run(op, *arguments, backend=None):
    """The results of an op (arguments.GIVES), None for absent ones. A single result comes by itself."""
    asked = ASKED.get(op) if backend is None else None
    results = None if asked is None else asked(*arguments)
    given = dict(zip(TAKES[op], arguments, strict=False))
    if results is None:
        if "needs" not in given:
            check(op, given)
        serving = backend or _serving(given)
        streams = [value for name, value in given.items() if name in _ROWS and value is not None]
        whole = serving.any_shape and all(t.is_contiguous() and t.dim() <= MAX_DIMS for t in streams)  # all, or all flat
        results = getattr(serving, op)(*(_laid(name, value, whole) for name, value in given.items()))
    elif op == "edit" or op == "edit_add":
        return results if given["want_z"] else (results, None)
    elif op == "edit_add_norm" and not given["want_stats"]:
        out, normed, *z = results
        results = (out, normed, *(z or (None,)), None, None)
    names = GIVES[op]
    if len(names) == 1:
        return _shaped(names[0], results, given)
    return tuple(None if r is None else _shaped(name, r, given) for name, r in zip(names, results, strict=True))


def exporting():
    """Whether torch.export traces. torch 2.11's is_exporting() is true in every graph of torch.compile; what it reads is not."""
    return torch.compiler._is_exporting_flag


def flat(tensor):
    """(rows, width) with unit inner stride: a view if strides allow, else a copy."""
    if tensor.dim() != 2:
        width = tensor.shape[-1]
        rows = tensor.numel() // width if width else math.prod(tensor.shape[:-1])
        tensor = tensor.reshape(rows, width)
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _laid(name, value, whole):
    if not isinstance(value, torch.Tensor):
        return value
    if name in _ONE_A_ROW:
        return value.reshape(-1).contiguous()
    if name not in _ROWS:
        return value.contiguous()
    return value if whole else flat(value)


def _rows(given):
    """The leading rows and their width, because grad_z has no width of its own."""
    names = ("hidden", "x", "residual_out", "grad", "grad_z")
    some = next(given[n] for n in names if given.get(n) is not None)
    wide = next((given[n] for n in (*names[:-1], "read") if given.get(n) is not None), some)
    return some, wide.shape[-1]


def _serving(given):
    """The backend for these arguments. Rows without elements have null pointers and nothing for a kernel to do."""
    rows, width = _rows(given)
    if not (width and rows.numel()):
        return load("reference")
    if "x_dtype" in given:
        dtypes = given["x_dtype"], given["residual_dtype"]
    elif "dtype" in given:
        grad = given.get("grad")
        dtypes = given["dtype"], None if grad is None or grad.dtype == given["dtype"] else grad.dtype
    else:
        dtypes = rows.dtype, None if given.get("residual") is None else given["residual"].dtype
    return select(rows.device.type, *dtypes, bool(given.get("on_sum")))


def _shaped(name, result, given):
    """Rows with the leading shape of the given rows, parameters' gradients shaped as the parameters. A shared
    coefficient's gradient is summed."""
    if name in _RESULT_ROWS:
        rows, _ = _rows(given)
        return result if result.dim() == rows.dim() else result.view(*rows.shape[:-1], result.shape[-1])
    parameter = given.get(name.removeprefix("d_")) if name.startswith("d_") else None
    if parameter is None or result.shape == parameter.shape:
        return result
    result = result if result.numel() == parameter.numel() else result.sum()
    return result.view(parameter.shape)
