"""What the adopters of neighbors share: an edit found on a model, and a trial that it is what it seems.

An adopter is a module with `find(model)`, which returns a list of `Found` and changes nothing. It looks for its
neighbor's classes in sys.modules and never imports them.
"""

import copy
import sys
from dataclasses import dataclass

import torch
from torch import nn

from ..edits.form import Form

# Where an edit runs among those at one site: in the module's own forward, in a hook that is registered, in one
# that is registered for each call, around the whole layer.
IN_MODULE, IN_HOOK, IN_LATE_HOOK, AROUND_LAYER = range(4)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
STRUCTURE = 1e-4  # of the largest value: another formula is off by more, fp32 parametrizations in float64 by 1e-6


class Refusal(ValueError):
    """Why an edit cannot be adopted."""


@dataclass(eq=False)
class Found:
    """An edit of a neighbor.

    name: of the neighbor and the place, for messages. module: whose output (or input: `side`) it edits.
    when: IN_MODULE … AROUND_LAYER. switch: takes it out of force and back. hook: its id, for IN_HOOK.
    forms: its normal forms, applied in order. reason: why it cannot be adopted, or None.
    group: edits of one group are adopted together or not at all. hides_layer: while it is in force, the layer's own
    module is not in the model's list.
    """

    name: str
    module: nn.Module
    when: int
    switch: object
    side: str = "output"
    hook: int | None = None
    forms: tuple = ()
    reason: str | None = None
    group: object = None
    hides_layer: bool = False
    positions: object = None
    places: tuple = ()  # (layer, site, forms), once known; several where a fused projection holds q, k and v

    def read(self, function):
        """Take the forms that `function` reads off the neighbor, or its reason. Returns self."""
        try:
            self.forms = tuple(function())
        except Refusal as refusal:
            self.reason = str(refusal)
        return self


def classes(module, *names):
    """Classes of a module that something has imported: those it has, or an empty tuple if nothing did."""
    loaded = sys.modules.get(module)
    return tuple(c for name in names if isinstance(c := getattr(loaded, name, None), type))


def values(tensor, *shape):
    """A neighbor's tensor as its present fp32 values, reshaped."""
    if tensor.is_meta:
        raise Refusal("its tensors are on the meta device: there are no values to take over")
    tensor = tensor.detach().to("cpu", torch.float32, copy=True)
    return tensor.reshape(shape) if shape else tensor


def _check_finite(forms):
    for form in forms:
        for name, tensor in zip(("scale", "bias", "read", "offset", "write"), form.tensors(), strict=True):
            if tensor is not None and not tensor.isfinite().all():
                raise Refusal(f"its {name} holds values that are NaN or infinite")


# --- the trial: the neighbor's own code against the forms, in float64 on small random rows ---------------------


class _Inner(nn.Module):
    """Replaces what a wrapper wraps: keeps its input, and answers with rows of its own."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x, *args, **kwargs):
        self.received = x
        return self.answer


def rows(width, seed=0):
    return torch.randn(1, 5, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def try_wrapper(module, inner, forms, side="output"):
    """Raise Refusal unless the wrapper's own forward is its inner module's, with the forms on that side."""
    _check_finite(forms)
    width = forms[0].width
    given, answer = rows(width, 0), rows(width, 1)
    stand_in = _Inner(answer)
    said = _tried(lambda: type(module).forward(bare(module, **{inner: stand_in}), given.clone()))
    if side == "output":
        _same(stand_in.received, given)
        _same(said, applied(forms, answer))
    else:
        _same(stand_in.received, applied(forms, given))
        _same(said, answer)


def try_call(call, forms):
    """Raise Refusal unless call(rows) equals the forms applied to the rows."""
    _check_finite(forms)
    given = rows(forms[0].width)
    _same(_tried(lambda: call(given.clone())), applied(forms, given))


def _tried(call):
    try:
        return call()
    except Exception as error:  # whatever foreign code does with what it does not expect: not adopted
        raise Refusal(f"its own code could not be tried on random rows: {type(error).__name__}: {error}") from error


def applied(forms, hidden):
    for form in forms:
        hidden = Form(*(None if t is None else t.to(hidden.dtype) for t in form.tensors()))(hidden)
    return hidden


def bare(module, **children):
    """A float64 copy of a module on the CPU, without hooks, with some children replaced by the given ones."""
    twin = object.__new__(type(module))
    left_out = ("forward", "_old_forward", "_hf_hook", *_HOOKS)
    twin.__dict__.update({k: v for k, v in module.__dict__.items() if k not in left_out})
    for name in _HOOKS:
        twin.__dict__[name] = type(module.__dict__[name])()
    twin.__dict__["_modules"] = {**module._modules, **dict.fromkeys(children)}
    twin = copy.deepcopy(twin).to("cpu", torch.float64)
    twin.__dict__["_modules"].update(children)
    return twin


def _same(got, expected):
    if not isinstance(got, torch.Tensor) or got.shape != expected.shape:
        raise Refusal(f"in a trial its forward gave {_described(got)}, expected {_described(expected)}")
    error, size = (got.double() - expected).abs().max(), expected.abs().max()
    if not error <= STRUCTURE * size:
        raise Refusal(
            f"in a trial on random rows its own code gave something else than its formula (off by {error / size:.1e} "
            "of the largest value): a subclass or a version that computes more than the tensors say"
        )


def _described(value):
    return f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
