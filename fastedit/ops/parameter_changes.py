"""Whether what a tensor holds may have changed since one last looked, and whether it holds anything that one may look at."""

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
    """Once an edit: its masters ask for no more advice."""
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
    """Whether an optimizer that holds the parameter has begun in this process, after step number `since`."""
    return _stepped.get(parameter, 0) > since


def advise_rate(parameters, advice):
    """Say `advice` once, if the first step of an optimizer with these parameters is at a rate that is too low."""
    for parameter in parameters:
        _rates[parameter] = advice


def optimizer_steps():
    """How many steps optimisers have taken in this process.

    Version counters do not tell of all of them: `fused=True`, which is the Trainer's default, moves parameters without
    raising a version.
    """
    return _steps


def stamp(tensor):
    """What differs once a tensor was written in place, or given other memory (`parameter.data = …`).

    A write through `parameter.data` in place (`p.data.copy_`) leaves no trace that could be seen.
    """
    return tensor._version, tensor.data_ptr()


def transformed():
    """Whether tensors may be wrapped, by torch.func (vmap, grad, jvp) or forward-mode differentiation: then plain operations
    are all that sees the whole of them.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


register_optimizer_step_post_hook(_count)
