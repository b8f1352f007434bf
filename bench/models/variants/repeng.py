"""repeng (Vogel 2024): a module around each block that adds a control vector; its `operator` also takes ablation."""

import contextlib

import numpy as np
import torch
from torch import nn

from ..registry import INFERENCE, variant


@contextlib.contextmanager
def _numpy_1_name():
    """repeng 0.4.0 names np.float_, which NumPy 2 removed, in annotations that are read when it is imported."""
    if hasattr(np, "float_"):
        yield
        return
    np.float_ = np.float64
    try:
        yield
    finally:
        del np.float_


class Positioned(nn.Module):
    """repeng masks by position and wants one position a token of every row; transformers 5 hands its layers one row
    for all unless the caller says more. `generate` does."""

    def __init__(self, controlled):
        super().__init__()
        self.controlled = controlled
        self.generate = controlled.generate

    def forward(self, input_ids, past_key_values=None, **inputs):
        rows, length = input_ids.shape
        start = past_key_values.get_seq_length() if past_key_values is not None else 0
        positions = torch.arange(start, start + length, device=input_ids.device).expand(rows, -1)
        return self.controlled(
            input_ids=input_ids, position_ids=positions, past_key_values=past_key_values, **inputs
        )


def _project_out(hidden, direction):
    return hidden - (hidden * direction).sum(-1, keepdim=True) * direction


@variant("repeng", kinds=("steer", "ablate"), works=INFERENCE, needs=("repeng", "gguf"), families=("llama",))
def repeng(model, values):
    with _numpy_1_name():
        from repeng import ControlModel
    cast = values.to(model.device, model.dtype)
    steering = values.kind == "steer"
    vectors = {layer: form.bias if steering else form.read[0] for layer, form in enumerate(cast.forms)}
    controlled = ControlModel(model, list(vectors))
    controlled.set_raw_control(vectors, **({} if steering else {"operator": _project_out}))
    return Positioned(controlled)
