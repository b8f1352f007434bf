"""The tensors of one edit at one site of one layer: fp32 masters, a submodule of the model."""

import torch
from torch import nn

from .edits import TENSORS, Edit


class Masters(nn.Module):
    """An edit's tensors, parameters if it is trainable, else buffers; fp32 whatever the model becomes.

    `dial` (1,) is the edit's strength now, fp32 and not saved; `strength` is the same number for Python.
    """

    def __init__(self, edit, spot, width, device):
        super().__init__()
        self.form_of, self.trainable, self.rank = edit.form, edit.trainable, edit.rank
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
        self.whole = None  # fastedit.distributed.whole, for masters laid out over several processes

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
        masters = self.masters()
        if self.whole is not None:
            masters = {name: self.whole(tensor) for name, tensor in masters.items()}
        return self.form_of(masters)

    def tensors(self):
        """(scale, bias, read, offset, write), where the masters are the normal form's own (`direct`)."""
        get = (self._parameters if self.trainable else self._buffers).get
        if self.whole is not None:
            return tuple(None if (t := get(name)) is None else self.whole(t) for name in TENSORS)
        return get("scale"), get("bias"), get("read"), get("offset"), get("write")

    def set_strength(self, strength):
        self.strength = strength
        self.dialled = self.dialled or strength != 1.0
        self.dial.fill_(strength)

    def _apply(self, fn, recurse=True):
        """Follow the model to its device, never to its dtype: in bf16, 1 ± 1e-3 rounds back to 1."""

        def move(tensor):
            moved = fn(tensor)
            return moved if moved.dtype is torch.float32 else tensor.to(moved.device)

        was_meta = self.dial.is_meta
        with torch.inference_mode(False):  # inference tensors could neither be dialled nor trained
            applied = super()._apply(move, recurse)
            if was_meta and not self.dial.is_meta:  # to_empty: nothing will load what no state dict holds
                self.dial.fill_(self.strength)
        return applied

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        device = next(iter(self.masters().values())).device
        if self.dial.is_meta and device.type != "meta":  # assign=True onto a model made on meta
            self.dial = torch.full((1,), self.strength, device=device)

    def __setattr__(self, name, value):
        """Stay where accelerate would offload: its hooks bring weights back for a forward, and masters have none."""
        if name == "_hf_hook":
            value.detach_hook(self)
            self.to(getattr(value, "execution_device", None))
        elif name not in ("forward", "_old_forward"):
            super().__setattr__(name, value)

    def extra_repr(self):
        return ", ".join(f"{n} {tuple(t.shape)}" for n, t in self.masters().items())
