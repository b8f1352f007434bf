"""RED as its authors built it: a module in the place of the FFN's last linear map."""

from torch import nn

from ..registry import WORKS, variant
from ..sizes import site_path


class Edited(nn.Module):
    """linear(x) · scale + bias, with parameters of shape (1, width)."""

    def __init__(self, linear, scale, bias, trainable):
        super().__init__()
        self.linear = linear
        self.scale = nn.Parameter(scale.clone()[None], requires_grad=trainable)
        self.bias = nn.Parameter(bias.clone()[None], requires_grad=trainable)

    def forward(self, x):
        return self.linear(x) * self.scale + self.bias


@variant("RED wrapper modules", kinds=("red",), works=WORKS)
def red_wrapper(model, values):
    path = site_path(model, values.site)
    for layer, form in enumerate(values.to(model.device, model.dtype).forms):
        owner, _, name = path.format(layer).rpartition(".")
        owner = model.get_submodule(owner)
        setattr(owner, name, Edited(getattr(owner, name), form.scale, form.bias, values.trainable))
    return model
