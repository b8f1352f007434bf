"""repeng's ControlModel (Vogel 2024): a module around a block that adds a control vector to its output.

If the layer is given position_ids, repeng does not edit the padding in front of a prompt. The adopted edit does.
Padding is masked, so everything else is the same.
"""

from torch import nn

from ..edits.form import Form
from .found import AROUND_LAYER, Found, Refusal, classes, try_wrapper, values
from .switches import ListSwitch


def find(model):
    kinds = classes("repeng.control", "ControlModule")
    return [
        _found(f"{path}.{index}", layers, index, member)
        for path, layers in model.named_modules()
        if isinstance(layers, nn.ModuleList)
        for index, member in enumerate(layers)
        if isinstance(member, kinds)
    ]


def inner_model(model):
    """The model in a ControlModel. None for other objects."""
    return model.model if isinstance(model, classes("repeng.control", "ControlModel")) else None


def _found(path, layers, index, wrapper):
    switch = ListSwitch(layers, index, wrapper, wrapper.block)
    found = Found(f"repeng control at {path}", wrapper.block, AROUND_LAYER, switch, hides_layer=True)

    def forms():
        params = wrapper.params
        if params.control is None:
            return  # the wrapper changes nothing now
        if wrapper._forward_hooks or wrapper._forward_pre_hooks or "forward" in wrapper.__dict__:
            raise Refusal("hooks were registered on the ControlModule itself, which would not run while it is adopted")
        if params.normalize:
            raise Refusal("normalize=True keeps the norm of the hidden states, which no fused edit does")
        if params.operator is not type(params).operator:
            raise Refusal("it has an operator of its own, whose formula cannot be read; the default one adds")
        if params.control.numel() != params.control.shape[-1]:
            raise Refusal(f"its control has shape {tuple(params.control.shape)}, expected (width,)")
        form = Form(bias=values(params.control, -1))
        try_wrapper(wrapper, "block", (form,))
        yield form

    return found.read(forms)
