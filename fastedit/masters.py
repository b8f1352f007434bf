"""The tensors of one edit at one site of one layer: fp32 masters, a submodule of the model."""

import torch
from torch import nn

from .edits import Edit


class InFp32(nn.Module):
    """A module whose tensors follow the model to its device, never to its dtype: in bf16, 1 ± 1e-3 rounds back to 1."""

    def _apply(self, fn, recurse=True):
        def move(tensor):
            moved = fn(tensor)
            return moved if moved.dtype is torch.float32 else tensor.to(moved.device)

        with torch.inference_mode(False):  # inference tensors could neither be dialled nor trained
            return super()._apply(move, recurse)


class Masters(InFp32):
    """An edit's tensors, parameters if it is trainable, else buffers; fp32 whatever the model becomes.

    `dial` (1,) is the edit's strength now, fp32 and not saved; `strength` is the same number for Python.
    """

    is_sensor = False

    def __init__(self, edit, spot, width, device):
        super().__init__()
        self.is_probe = edit.is_probe
        self.form_of, self.trainable, self.rank = edit.form, edit.trainable, edit.rank
        self.positions, self.keep_norm = edit.positions, edit.keep_norm
        self.gating = None  # its gating.Gating, if planning gives it one
        self.direct = edit.form is Edit.form  # the masters are the normal form's own tensors
        for name, tensor in edit.tensors(spot, width).items():
            tensor = tensor.to(device, torch.float32, copy=True)
            if self.trainable:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        self.register_buffer("dial", torch.full((1,), edit.strength, device=device), persistent=False)
        self.strength = edit.strength
        self.dialled = not self.trainable

    @property
    def needs_plan(self):
        """Whether it must know a forward's tokens."""
        return self.positions is not None or self.is_probe or (self.gating is not None and self.gating.needs_plan)

    @property
    def alone(self):
        """Whether it is a stage of its own."""
        return self.gating is not None or self.keep_norm or self.is_probe

    def masters(self):
        """{name: tensor}"""
        if self.trainable:
            return dict(self._parameters)
        return {name: tensor for name, tensor in self._buffers.items() if name != "dial"}

    def sources(self):
        """(dict that holds it, name, tensor) of all that the edit's form depends on."""
        return [(held, name, t) for held in (self._parameters, self._buffers) for name, t in held.items()]

    def form(self):
        """The normal form at strength 1, differentiable."""
        return self.form_of(self.masters())

    def tensors(self):
        """(scale, bias, read, offset, write), where the masters are the normal form's own (`direct`)."""
        get = (self._parameters if self.trainable else self._buffers).get
        return get("scale"), get("bias"), get("read"), get("offset"), get("write")

    def set_strength(self, strength):
        self.strength = strength
        self.dialled = self.dialled or strength != 1.0
        self.dial.fill_(strength)

    def extra_repr(self):
        return ", ".join(f"{n} {tuple(t.shape)}" for n, t in self.masters().items())
