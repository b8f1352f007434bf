"""Modules that stay in fp32 whatever dtype the model around them becomes."""

import torch
from torch import nn


class InFp32(nn.Module):
    """A module whose tensors follow the model to its device but not to its dtype: in bf16, 1 ± 1e-3 rounds to 1."""

    def _apply(self, fn, recurse=True):
        def move(tensor):
            moved = fn(tensor)
            return moved if moved.dtype is torch.float32 else tensor.to(moved.device)

        with torch.inference_mode(False):  # inference tensors could neither be dialled nor trained
            return super()._apply(move, recurse)

    def __setattr__(self, name, value):
        """Stay in place where accelerate would offload: its hooks bring weights back for a forward, and masters have none."""
        if name == "_hf_hook":
            value.detach_hook(self)
            self.to(getattr(value, "execution_device", None))
        elif name not in ("forward", "_old_forward"):
            super().__setattr__(name, value)
