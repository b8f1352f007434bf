"""The value of a hidden state: the MLP that RE-Control ascends (arXiv 2406.05954), with one to three hidden layers and one
value or several.

Nets of up to two hidden layers and one value are ascended by a kernel (`fastedit.ops.value_ascent`). Deeper ones, several
values and target scores are ascended by `ascended` here, with the same savings but for signs that change.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from ..files.archive import LIMIT, read_archive
from ..files.sealed import Damaged, plain_tensors, read_regular
from .parameter_changes import optimizer_steps

NAMES = ("weight", "bias", "weight2", "bias2", "weight3", "bias3", "head", "offset")  # of the parameters
GRAM_ROWS = 1024  # of the Gram matrix at a time: its fp64 sums take 8 bytes where the result takes 4


class ValueNet(nn.Module):
    """V(h) = head · relu(W h + b) + offset, or with one or two hidden layers more between the two.

    Parameters, fp32 whatever the model becomes: weight (units, width), bias (units,); weight2 (units2, units), bias2 (units2,),
    weight3 (units3, units2), bias3 (units3,), None where there is no such layer; head (last units,), or (outputs, last units)
    of several outputs; offset (outputs,).

    Args:
        width: of the hidden states it reads.
        units: of the hidden layers, one number or up to three. Initialized as nn.Linear is.
        device: of the parameters. outputs: values per state. With one, V is one number per row, else (…, outputs).

    Raises:
        ValueError: widths below 1, or not one to three hidden layers.
    """

    def __init__(
        self, width: int, units: int | Sequence[int] = 4096, device: torch.device | str | None = None, *, outputs: int = 1
    ) -> None:
        super().__init__()
        sizes = (width, *((units,) if isinstance(units, int) else units), outputs)
        if len(sizes) not in (3, 4, 5) or not all(isinstance(n, int) and 0 < n < 1 << 31 for n in sizes):
            raise ValueError(
                f"width {width!r:.60}, units {units!r:.60} and outputs {outputs!r:.60}: expected one to three hidden layers of 1 "
                "unit or more, and less than 2^31"
            )
        self._take([nn.Linear(m, n, device=device, dtype=torch.float32) for m, n in itertools.pairwise(sizes)])

    def _take(self, layers):
        *hidden, last = layers
        for number, name in enumerate(("", "2", "3")):
            layer = hidden[number] if number < len(hidden) else None
            setattr(self, f"weight{name}", None if layer is None else layer.weight)
            setattr(self, f"bias{name}", None if layer is None else layer.bias)
        head = last.weight.detach().clone()
        self.head, self.offset = nn.Parameter(head[0] if len(head) == 1 else head), last.bias
        self._grams = {}  # dtype → (key, matrix)
        self.gram_version = -1

    @classmethod
    def from_sequential(cls, module: Iterable[nn.Module]) -> ValueNet:
        """The net of module, an nn.Sequential of two to four Linear with ReLU between them, as fp32 copies of its weights.

        Dropout is left out, as in evaluation. Raises ValueError for any other layer or order.
        """
        layers = [layer for layer in module if not isinstance(layer, (nn.Dropout, nn.Identity))]
        kinds = [type(layer) for layer in layers]
        if len(kinds) not in (3, 5, 7) or kinds != [(nn.Linear, nn.ReLU)[n % 2] for n in range(len(kinds))]:
            found = ", ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"the layers are {found or 'none'}; expected two to four Linear, with ReLU between them")
        linear = layers[::2]
        net = cls.__new__(cls)
        nn.Module.__init__(net)
        net._take([_fp32_copy(layer) for layer in linear])
        return net

    @classmethod
    def from_released(cls, path: str | os.PathLike[str]) -> ValueNet:
        """The net in a file of RE-Control's authors, or in a file like it: fc1, fc2 (, fc3 (, fc4)).

        path: .safetensors, or a PyTorch file of a state dict. Reading it runs no code of it.

        Raises:
            ValueError: other layers, or no such file.
        """
        state = _read_state(path)
        names = sorted({key.rpartition(".")[0] for key in state})
        whole = {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}
        if len(names) not in (2, 3, 4) or names != [f"fc{n + 1}" for n in range(len(names))] or set(state) != whole:
            raise ValueError(
                f"{path} holds {', '.join(sorted(state)[:6])}; expected weight and bias of fc1, fc2 (, fc3 (, fc4))"
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
    def from_tensors(cls, *tensors: torch.Tensor | None) -> ValueNet:
        """The frozen net on these fp32 tensors themselves, in the order of NAMES, without copies. None for a layer it lacks."""
        net = cls.__new__(cls)
        nn.Module.__init__(net)
        net._grams, net.gram_version = {}, -1
        for name, tensor in zip(NAMES, tensors, strict=True):
            net.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))
        return net

    def mixed(self, weights: Sequence[float] | torch.Tensor) -> ValueNet:
        """A frozen net of one output, the sum of this one's by `weights`, a number each."""
        weights = torch.as_tensor(weights, dtype=torch.float32, device=self.head.device)
        if weights.shape != (self.outputs,):
            raise ValueError(f"weights are {tuple(weights.shape)}, expected one for each of {self.outputs} outputs")
        with torch.no_grad():
            head, offset = weights @ self.head.view(self.outputs, -1), (weights @ self.offset)[None]
        kept = (None if t is None else t.detach().clone() for t in (getattr(self, name) for name in NAMES[:-2]))
        return ValueNet.from_tensors(*kept, head, offset)

    @property
    def outputs(self) -> int:
        """Values per state."""
        return len(self.offset)

    @property
    def hidden_layers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """[(weight, bias), …]"""
        layers = ((self.weight, self.bias), (self.weight2, self.bias2), (self.weight3, self.bias3))
        return [layer for layer in layers if layer[0] is not None]

    @property
    def width(self) -> int:
        """Of the hidden states that it reads."""
        return self.weight.shape[1]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """V of each row (…, width), (…) or (…, outputs): fp32, differentiable. fp64 for fp64 rows."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        z = hidden.to(dtype)
        for weight, bias in self.hidden_layers:
            z = torch.relu(nn.functional.linear(z, weight.to(dtype), bias.to(dtype)))
        if self.head.dim() == 1:
            return z @ self.head.to(dtype) + self.offset.to(dtype)
        return nn.functional.linear(z, self.head.to(dtype), self.offset.to(dtype))

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """(weight, bias, weight2, bias2, head), without gradients: what the kernel takes, of a net that it serves."""
        if self.weight3 is not None or self.outputs > 1:
            raise ValueError("a net of three hidden layers or several outputs has no kernel: see `ascended`")
        return tuple(
            t if t is None else t.detach() for t in (self.weight, self.bias, self.weight2, self.bias2, self.head)
        )

    @torch.no_grad()
    def ascended(
        self, hidden: torch.Tensor, steps: int, step_size: float, target: float | Sequence[float] | None = None
    ) -> torch.Tensor:
        """h' of `fastedit.ops.value_ascent`, for any net: u ← u + a ∇V(h + u), or with a target ∇ −½ Σ (V(h + u) − target)².

        The steps stay in z = W h + b, which moves by a · (W Wᵀ) dV/dz.

        Args:
            hidden: (…, width), fp32, bf16 or fp16.
            steps, step_size: n and a.
            target: a number for each output, or None.
        """
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        (weight, bias), *deeper = [(w.to(dtype), b.to(dtype)) for w, b in self.hidden_layers]
        head, offset = self.head.to(dtype).view(self.outputs, -1), self.offset.to(dtype)
        if target is not None:
            target = torch.as_tensor(target, dtype=dtype, device=head.device)
        z, gram = nn.functional.linear(hidden.to(dtype), weight, bias), self.gram(dtype)
        total = torch.zeros_like(z)
        for _ in range(steps):
            slope = self._slope(z, deeper, head, offset, target)
            total += slope
            z = z + step_size * (slope @ gram)
        return (hidden.to(dtype) + step_size * (total @ weight)).to(hidden.dtype)

    @staticmethod
    def _slope(z, deeper, head, offset, target):
        """dV/dz of the first layer's z (…, units); relu'(0) = 0."""
        on = [z > 0]
        for weight, bias in deeper:
            z = nn.functional.linear(torch.relu(z), weight, bias)
            on.append(z > 0)
        if target is None:
            slope = head.sum(0).expand_as(z)
        else:
            slope = (target - nn.functional.linear(torch.relu(z), head, offset)) @ head
        for place in range(len(on) - 1, -1, -1):
            slope = on[place] * slope
            if place:
                slope = slope @ deeper[place - 1][0]
        return slope

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
        units = [len(bias) for _, bias in self.hidden_layers]
        outputs = f", outputs={self.outputs}" if self.outputs > 1 else ""
        return f"width={self.width}, units={units[0] if len(units) == 1 else tuple(units)}{outputs}"


def _read_state(path):
    try:
        if str(path).endswith(".safetensors"):
            state = plain_tensors(read_regular(path, LIMIT))
        else:
            state = read_archive(path)
    except (Damaged, OSError) as error:
        raise ValueError(f"{path} could not be read as a state dict: it {error}") from None
    if not all(isinstance(key, str) and isinstance(t, torch.Tensor) for key, t in state.items()):
        raise ValueError(f"{path} holds something else than tensors by name, expected a state dict")
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
