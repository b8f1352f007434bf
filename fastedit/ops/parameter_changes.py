"""Whether a tensor's values may have changed since the last look, and whether it has values that may be looked at."""

import warnings
import weakref

import torch
from torch.autograd import forward_ad
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

LOW_RATE = 1e-4  # at or below it an edit does not leave the identity: the Trainer's 5e-5 leaves RED at chance
_steps = 0
_seen = weakref.WeakSet()  # optimizers that have stepped
_stepped = WeakIdKeyDictionary()  # the parameters they hold → the number of the step at which the latest of them began
_rates = WeakIdKeyDictionary()  # masters that train → what to say of a rate that is too low for them


def _count(optimizer, args, kwargs):
    global _steps
    _steps += 1
    if optimizer in _seen:
        return
    _seen.add(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                _stepped[parameter] = _steps
    _warn_of_rate(optimizer.param_groups)


def _warn_of_rate(groups):
    """Warn once per edit: its masters then ask for no more advice."""
    asked = [(p, float(g.get("initial_lr", g.get("lr", 1.0)))) for g in groups for p in g["params"] if p in _rates]
    low = [(p, rate) for p, rate in asked if 0 < rate <= LOW_RATE]
    advice = [_rates.pop(p) for p, _ in asked]
    if low:
        rate, advice = low[0][1], advice[0]
        warnings.warn(
            f"fastedit: the learning rate of the edit is {rate:g}; at {LOW_RATE:g} or less an edit hardly leaves the identity. "
            f"{advice}",
            stacklevel=2,
        )


def has_stepped(parameter, since=0):
    """Whether an optimizer that holds the parameter has taken a step in this process, after step number `since`."""
    return _stepped.get(parameter, 0) > since


def advise_rate(parameters, advice):
    """Show `advice` once, if the first step of an optimizer with these parameters has too low a learning rate."""
    for parameter in parameters:
        _rates[parameter] = advice


def optimizer_steps():
    """How many steps optimizers have taken in this process.

    Version counters do not show all of them: `fused=True`, the Trainer's default, changes parameters without raising a
    version.
    """
    return _steps


def stamp(tensor):
    """A value that differs once a tensor was written in place, or was given other memory (`parameter.data = …`).

    An in-place write through `parameter.data` (`p.data.copy_`) leaves no trace that could be seen.
    """
    return tensor._version, tensor.data_ptr()


def transformed():
    """Whether tensors may be wrapped, by torch.func (vmap, grad, jvp) or by forward-mode differentiation.

    Only plain operations see such tensors whole.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


register_optimizer_step_post_hook(_count)
