"""A model in eval mode while something is measured on it."""

import contextlib


@contextlib.contextmanager
def evaluating(model):
    """Set the model to eval mode. Afterwards, also after an exception, each of its modules is in its former mode.

    Flags are set one by one. `model.eval()` would call overridden `train` methods, which could not be called again in
    the same way to restore modules of which some train and some do not. Setting flags also avoids nn.Module's search
    for parameters, which took most of the time here.
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


def check_data(model, what):
    """Refuse a model on the meta device, but for weights that accelerate brings when they are needed.

    Raises:
        ValueError: a weight has no data; `what` needs it.
    """
    for path, module in model.named_modules():
        if "_hf_hook" in module.__dict__:
            continue
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.is_meta:
                raise ValueError(
                    f"{what} needs numbers, and {path}.{name} is on the meta device, which holds none: give the model its "
                    "weights first, by from_pretrained, load_state_dict(assign=True), or to_empty and load_state_dict"
                )
