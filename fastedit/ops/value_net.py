"""The value of a hidden state: the MLP that RE-Control ascends (arXiv 2406.05954), with one or two hidden layers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from .parameter_changes import optimizer_steps

GRAM_ROWS = 1024  # of the Gram matrix at a time: its fp64 sums take 8 bytes where the result takes 4


class ValueNet(nn.Module):
    """V(h) = head · relu(W h + b) + offset, or head · relu(W₂ relu(W h + b) + b₂) + offset.

    Parameters, fp32 whatever the model becomes: weight (units, width), bias (units,); weight2 (units2, units) and
    bias2 (units2,), None with one hidden layer; head (units2,) or (units,); offset (1,).

    Args:
        width: of the hidden states it reads.
        device: of the parameters. units: of the hidden layers, one number or two. Initialized as nn.Linear is.

    Raises:
        ValueError: widths below 1, or not one or two hidden layers.
    """

    def __init__(self, width: int, units: int | Sequence[int] = 4096, device: torch.device | str | None = None) -> None:
        super().__init__()
        sizes = (width, *((units,) if isinstance(units, int) else units))
        if len(sizes) not in (2, 3) or not all(isinstance(n, int) and n > 0 for n in sizes):
            raise ValueError(f"width {width!r} and units {units!r}: expected one or two hidden layers of 1 unit or more")
        layers = [nn.Linear(m, n, device=device, dtype=torch.float32) for m, n in zip(sizes, (*sizes[1:], 1), strict=True)]
        self._take(layers)

    def _take(self, layers):
        first, *middle, last = layers
        self.weight, self.bias = first.weight, first.bias
        self.weight2 = self.bias2 = None
        if middle:
            self.weight2, self.bias2 = middle[0].weight, middle[0].bias
        self.head, self.offset = nn.Parameter(last.weight.detach()[0].clone()), last.bias
        self._grams = {}  # dtype → (key, matrix)
        self.gram_version = -1

    @classmethod
    def from_sequential(cls, module: Iterable[nn.Module]) -> ValueNet:
        """The net of module, an nn.Sequential of Linear, ReLU, Linear (, ReLU, Linear to 1), as fp32 copies of its weights.

        Dropout is left out, as in evaluation. Raises ValueError for any other layer, order or output.
        """
        layers = [layer for layer in module if not isinstance(layer, (nn.Dropout, nn.Identity))]
        kinds = [type(layer) for layer in layers]
        if kinds not in ([nn.Linear, nn.ReLU, nn.Linear], [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]):
            found = ", ".join(kind.__name__ for kind in kinds)
            raise ValueError(
                f"the layers are {found or 'none'}; expected Linear, ReLU, Linear or Linear, ReLU, Linear, ReLU, Linear"
            )
        linear = layers[::2]
        if linear[-1].out_features != 1:
            raise ValueError(f"the last layer has {linear[-1].out_features} outputs, expected 1: a value")
        net = cls.__new__(cls)
        nn.Module.__init__(net)
        net._take([_fp32_copy(layer) for layer in linear])
        return net

    @classmethod
    def from_released(cls, path: str | os.PathLike[str]) -> ValueNet:
        """The net in a file of RE-Control's authors, or in a file like it: fc1, fc2 (, fc3), the last to one value.

        path: .safetensors, or a PyTorch file of a state dict. Reading it runs no code of it.

        Raises:
            ValueError: other layers, an output that is not one value (the successor's nets have five), or no such file.
        """
        state = _read_state(path)
        names = sorted({key.rpartition(".")[0] for key in state})
        whole = {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}
        if names not in (["fc1", "fc2"], ["fc1", "fc2", "fc3"]) or set(state) != whole:
            raise ValueError(
                f"{path} holds {', '.join(sorted(state)[:6])}; expected weight and bias of fc1, fc2 (, fc3)"
            )
        layers = []
        for number, name in enumerate(names):
            weight, bias = (state[f"{name}.{kind}"].float() for kind in ("weight", "bias"))
            layer = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0])
            with torch.no_grad():
                layer.weight.copy_(weight)
                layer.bias.copy_(bias)
            layers += [layer, nn.ReLU()] if number < len(names) - 1 else [layer]
        return cls.from_sequential(nn.Sequential(*layers))

    @classmethod
    def from_tensors(
        cls, weight: torch.Tensor, bias: torch.Tensor, weight2: torch.Tensor | None, bias2: torch.Tensor | None,
        head: torch.Tensor, offset: torch.Tensor,
    ) -> ValueNet:  # fmt: skip
        """The frozen net on these fp32 tensors themselves, without copies.

        weight (units, width), bias (units,); weight2 (units2, units) and bias2 (units2,), None for one hidden layer;
        head (units2,) or (units,); offset (1,).
        """
        net = cls.__new__(cls)
        nn.Module.__init__(net)
        net._grams, net.gram_version = {}, -1
        given = {"weight": weight, "bias": bias, "weight2": weight2, "bias2": bias2, "head": head, "offset": offset}
        for name, tensor in given.items():
            net.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))
        return net

    @property
    def width(self) -> int:
        """Of the hidden states that it reads."""
        return self.weight.shape[1]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """V of each row (…, width), (…): fp32, differentiable. fp64 for fp64 rows."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        z = torch.relu(nn.functional.linear(hidden.to(dtype), self.weight.to(dtype), self.bias.to(dtype)))
        if self.weight2 is not None:
            z = torch.relu(nn.functional.linear(z, self.weight2.to(dtype), self.bias2.to(dtype)))
        return z @ self.head.to(dtype) + self.offset.to(dtype)

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """(weight, bias, weight2, bias2, head), without gradients."""
        return tuple(
            t if t is None else t.detach() for t in (self.weight, self.bias, self.weight2, self.bias2, self.head)
        )

    def gram(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """weight @ weightᵀ (units, units), summed in fp64 and rounded once to dtype. Kept until the weight changes.

        Under torch.compile the existing one is used, and the compiled function checks it.
        """
        kept = self._grams.get(dtype)
        if torch.compiler.is_compiling():
            if kept is None:
                raise RuntimeError("the value net has no Gram matrix yet: call value_net.gram() before compiling")
            return kept[1]
        steps = optimizer_steps() if self.weight.requires_grad else None
        key = (id(self.weight), self.weight.data_ptr(), self.weight.device, steps, _version(self.weight))
        if kept is None or kept[0] != key:
            self._grams[dtype] = (key, _gram(self.weight.detach(), dtype))
            self.gram_version = key[-1]
        return self._grams[dtype][1]

    def _apply(self, fn, recurse=True):
        """Follow the model to its device, but not to its dtype."""

        def move(tensor):
            moved = fn(tensor)
            return moved if moved.dtype is torch.float32 else tensor.to(moved.device)

        self._grams.clear()
        return super()._apply(move, recurse)

    def __getstate__(self):
        return {**super().__getstate__(), "_grams": {}, "gram_version": -1}

    def extra_repr(self):
        units = [t.shape[0] for t in (self.weight, self.weight2) if t is not None]
        return f"width={self.width}, units={units[0] if len(units) == 1 else tuple(units)}"


def _read_state(path):
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is no such file fails in many ways
        raise ValueError(f"{path} could not be read as a state dict: {error}") from None
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected a state dict of tensors")
    return {key.removeprefix("module."): tensor for key, tensor in state.items()}


def _version(tensor):
    return 0 if tensor.is_inference() else tensor._version


def _fp32_copy(layer):
    copy = nn.Linear(layer.in_features, layer.out_features, device=layer.weight.device, dtype=torch.float32)
    with torch.no_grad():
        copy.weight.copy_(layer.weight)
        copy.bias.zero_() if layer.bias is None else copy.bias.copy_(layer.bias)
    return copy


@torch.inference_mode(False)
@torch.no_grad()
def _gram(weight, dtype):
    """The Gram matrix, computed outside inference mode so that it can be used beyond it."""
    wide, out = weight.double(), torch.empty((len(weight), len(weight)), dtype=dtype, device=weight.device)
    for first in range(0, len(weight), GRAM_ROWS):
        out[first : first + GRAM_ROWS] = wide[first : first + GRAM_ROWS] @ wide.T
    return out
