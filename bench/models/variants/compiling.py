"""torch.compile of a variant, beside others that are compiled from the same code."""

import functools
import types

import torch


def compiled(model):
    """The model with its forward compiled, in place.

    torch.compile keeps what it compiled with the code object that it came from, and looks through all of it at each
    call: variants of one class would wait for each other's guards. So each gets a frame with a code object of its own.
    """
    forward = model.forward

    def frame(*args, **kwargs):
        return forward(*args, **kwargs)

    own = types.FunctionType(frame.__code__.replace(), frame.__globals__, "frame", None, frame.__closure__)
    model.forward = torch.compile(functools.wraps(forward)(own))
    return model
