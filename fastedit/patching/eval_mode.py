"""A model in eval mode for as long as something is measured on it."""

import contextlib


@contextlib.contextmanager
def evaluating(model):
    """The model in eval mode; afterwards, and after an exception, each of its modules is in the mode that it had.

    Flags are set one by one: `model.eval()` would call overridden `train` methods, which setting the modes back, some
    modules training and others not, could not call again in the same way. And past nn.Module's search for parameters,
    which took most of the time here.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, training in modes:
            if training:
                object.__setattr__(module, "training", False)
        yield model
    finally:
        for module, training in modes:
            if module.training is not training:
                object.__setattr__(module, "training", training)
