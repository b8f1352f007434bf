"""Whether what a tensor holds may have changed since one last looked, and whether it holds anything that one may look at."""

import torch
from torch.autograd import forward_ad
from torch.optim.optimizer import register_optimizer_step_post_hook

_steps = 0


def _count(optimizer, args, kwargs):
    global _steps
    _steps += 1


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
