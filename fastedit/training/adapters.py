"""PEFT's adapters beside an edit: switched off, and restored as they were."""

import contextlib
import sys


@contextlib.contextmanager
def without_adapters(model):
    """PEFT's adapters off. Afterwards each is in its former state, trained or not.

    `PeftModel.disable_adapter` counts the model's parameters in each call, which took 4 % of a DUAL step. It serves
    adapters that have no layers of their own to switch, such as prompt tuning.
    """
    layers = _adapter_layers(model)
    if not layers:
        disable = getattr(model, "disable_adapter", contextlib.nullcontext)
        with disable():
            yield
        return
    trained = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, was in trained:
            if parameter.requires_grad is not was:
                parameter.requires_grad_(was)


def _adapter_layers(model):
    """The modules of PEFT in which an adapter is in force."""
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return [m for m in model.modules() if isinstance(m, kinds) and not m.disable_adapters]
