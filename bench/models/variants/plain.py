"""The unedited model, the training floor, and the strong baseline: a plain PyTorch hook a layer."""

import torch
from torch import nn
from torch.nn.functional import linear

from ..registry import INFERENCE, KINDS, TRAINED_KINDS, TRAINING, WORKS, variant
from ..sizes import blocks, site
from .compiling import compiled


@variant("unedited", kinds=KINDS, works=INFERENCE, same_edit=False, note="no edit")
def unedited(model, values):
    return model


variant("unedited again", kinds=KINDS, works=INFERENCE, same_edit=False, note="no edit")(unedited)


@variant("unedited compiled", kinds=KINDS, works=INFERENCE, same_edit=False, compiled=True, note="no edit")
def unedited_compiled(model, values):
    return compiled(model)


class InputBias(nn.Module):
    """The training floor: a bias on layer 0's input is all that trains, so that gradients must cross all layers."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.bias = nn.Parameter(torch.zeros_like(model.get_input_embeddings().weight[0]))

    def forward(self, input_ids, labels):
        return self.model(inputs_embeds=self.model.get_input_embeddings()(input_ids) + self.bias, labels=labels)


@variant("floor", kinds=TRAINED_KINDS, works=TRAINING, same_edit=False, note="trains an input bias only")
def floor(model, values):
    return InputBias(model)


variant("floor again", kinds=TRAINED_KINDS, works=TRAINING, same_edit=False, note="trains an input bias only")(floor)


@variant("hook", kinds=KINDS, works=WORKS)
def hook(model, values):
    """Each layer's edit as the fewest PyTorch operations that a person would write, tensors in the model's dtype."""
    write = _WRITTEN[values.kind]
    held = nn.ParameterList()
    for layer, form in zip(blocks(model), values.to(model.device, model.dtype).forms, strict=True):
        edit, tensors = write(form, values.trainable)
        if values.trainable:
            held.extend(tensors)
        site(model, layer, values.site).register_forward_hook(_on_output(edit))
    model.edits = held
    return model


@variant("hook compiled", kinds=KINDS, works=WORKS, compiled=True)
def hook_compiled(model, values):
    return compiled(hook(model, values))


def _on_output(edit):
    def after(module, args, output):
        if isinstance(output, tuple):
            return (edit(output[0]), *output[1:])
        return edit(output)

    return after


def _tensors(trainable, *tensors):
    return [nn.Parameter(t.clone()) if trainable else t.clone() for t in tensors]


def _scale_bias(form, trainable):
    s, b = tensors = _tensors(trainable, form.scale, form.bias)
    return lambda h: s * h + b, tensors


def _add(form, trainable):
    (v,) = tensors = _tensors(trainable, form.bias)
    return lambda h: h + v, tensors


def _project_out(form, trainable):
    (v,) = tensors = _tensors(trainable, form.read[0])
    return lambda h: h - (h @ v).unsqueeze(-1) * v, tensors


def _low_rank(form, trainable):
    if not trainable:
        read, c, write = tensors = _tensors(False, form.read, form.offset, form.write)
        return lambda h: h + linear(h, read, c) @ write, tensors
    source, c, write = tensors = _tensors(True, form.read + form.write, form.offset, form.write)
    return lambda h: h + linear(h, source - write, c) @ write, tensors


_WRITTEN = {"red": _scale_bias, "steer": _add, "ablate": _project_out, "lowrank4": _low_rank}
