"""Whether what a tensor holds may have changed since one last looked."""

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


register_optimizer_step_post_hook(_count)
