"""The hooks of steering-vectors: on a module of each layer, adding a vector to its output in place."""

import inspect
import sys
import types

import torch

from ..edits.form import Form
from .found import IN_HOOK, Found, Refusal, try_call, values
from .switches import HookSwitch

MODULE = "steering_vectors.steering_vector"
_OPERATORS = "steering_vectors.steering_operators"


def find(model):
    if MODULE not in sys.modules:
        return []
    return [
        _found(path, module, key, hook)
        for path, module in model.named_modules()
        for key, hook in module._forward_hooks.items()
        if getattr(hook, "__module__", None) == MODULE and inspect.isfunction(hook)
    ]


def _found(path, module, key, hook):
    found = Found(f"steering-vectors hook on {path}", module, IN_HOOK, HookSwitch(module, key), hook=key)

    def forms():
        held = inspect.getclosurevars(hook).nonlocals
        if not {"target_activation", "token_indices", "operator"} <= held.keys():
            raise Refusal("it is not the hook that steering-vectors 0.12 registers")
        if held["token_indices"] not in (slice(None), slice(0, None)):
            raise Refusal(
                f"it acts at the tokens {held['token_indices']} of each call, which are different tokens for a "
                "prompt and for a step of decoding; only hooks that act at all tokens are adopted"
            )
        vector = held["target_activation"]
        made = tuple(_forms(held["operator"], values(vector, vector.shape[-1])))
        wide = _in_float64(hook)
        try_call(lambda rows: _after(wide, rows), made)
        yield from made

    return found.read(forms)


def _in_float64(hook):
    """The same function on float64 tensors: its ablation multiplies rows by the vector in one dtype."""
    held = [cell.cell_contents for cell in hook.__closure__]
    held = [v.detach().to("cpu", torch.float64) if isinstance(v, torch.Tensor) else v for v in held]
    return types.FunctionType(hook.__code__, hook.__globals__, closure=tuple(types.CellType(v) for v in held))


def _after(hook, rows):
    hook(None, None, rows)  # which changes them in place
    return rows


def _forms(operator, vector):
    known = getattr(operator, "__module__", None) == _OPERATORS
    name = operator.__name__.strip("_") if known else None
    unit = (vector.double() / vector.double().norm()).float()[None]
    if operator is None or name == "addition_operator":
        return (Form(bias=vector),)
    if name == "ablation_operator":
        return (Form(read=unit, write=-unit),)
    if name == "ablation_then_addition_operator":
        return Form(read=unit, write=-unit), Form(bias=vector)
    raise Refusal("it has an operator of its own, whose formula cannot be read; those of steering-vectors are adopted")
