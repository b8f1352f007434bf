"""Values that may differ by layer: one tensor for all, a stack of them, or a mapping from layer numbers."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spot:
    """A layer as an edit sees it: number `index` of `total` in the model, and `order`th of the `count` edited
    layers."""

    name: str
    index: int
    total: int
    order: int = 0
    count: int = 1
    of_model: bool = False  # at a site of the model, such as its embeddings


def as_values(name, value):
    """A finite fp32 tensor on the CPU. Raises for integers, complex numbers, NaN and infinities."""
    try:
        tensor = value.detach() if isinstance(value, torch.Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} is {value!r:.60}, expected a tensor, or what torch.as_tensor takes") from None
    if tensor.layout is not torch.strided or tensor.is_meta:
        where = "on the meta device" if tensor.is_meta else f"of layout {tensor.layout}"
        raise TypeError(f"{name} is {where}, expected a dense tensor with numbers in it")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected a floating dtype such as float32")
    if tensor.dim() and not tensor.shape[-1]:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected one number or more in its last dimension")
    tensor = tensor.to("cpu", torch.float32, copy=True)
    if not tensor.isfinite().all():
        raise ValueError(
            f"{name} holds {int((~tensor.isfinite()).sum())} values that are NaN or infinite in fp32"
        )
    return tensor


class PerLayer:
    """`value` for each layer. `dims`: the numbers of dimensions that one layer's tensor may have."""

    def __init__(self, name, value, dims):
        self.name, self.dims = name, dims
        mapping = value if isinstance(value, Mapping) else None
        for attribute in ("directions", "vectors"):
            if mapping is None and isinstance(getattr(value, attribute, None), Mapping):
                mapping = getattr(value, attribute)
        if mapping is not None:
            if not mapping:
                raise ValueError(f"{name} is an empty mapping, expected layer number → tensor")
            self.by_layer = {_layer_key(name, k): as_values(f"{name}[{k}]", v) for k, v in mapping.items()}
            self.shared = self.stack = None
            some = next(iter(self.by_layer.values()))
            if any(t.shape[-1:] != some.shape[-1:] for t in self.by_layer.values()):
                raise ValueError(f"{name} has tensors of different widths in different layers")
        else:
            tensor = as_values(name, value)
            self.by_layer = None
            self.stack = list(tensor) if tensor.dim() == max(dims) + 1 else None
            self.shared = None if self.stack is not None else tensor
            if self.stack == []:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}: it holds no layers")
            some = tensor if self.stack is None else self.stack[0]
        if some.dim() not in dims:
            shapes = " or ".join({1: "(width,)", 2: "(rank, width)"}[d] for d in dims)
            raise ValueError(
                f"{name} has shape {tuple(some.shape)}, expected {shapes}, the same with a leading layer "
                "dimension, or a mapping from layer number to such a tensor"
            )

    @property
    def layers(self):
        """The layers that a mapping names, or None."""
        return None if self.by_layer is None else tuple(sorted(self.by_layer))

    def all(self):
        """Every tensor held, for checks of shape."""
        if self.by_layer is not None:
            return list(self.by_layer.values())
        return [self.shared] if self.stack is None else self.stack

    def map(self, function):
        """The same values after `function`, which takes and returns a tensor."""
        new = object.__new__(PerLayer)
        new.name, new.dims = self.name, self.dims
        new.by_layer = None if self.by_layer is None else {k: function(v) for k, v in self.by_layer.items()}
        new.stack = None if self.stack is None else [function(v) for v in self.stack]
        new.shared = None if self.shared is None else function(self.shared)
        return new

    def at(self, spot):
        """The tensor of a layer."""
        if self.shared is not None:
            return self.shared
        if self.by_layer is not None:
            keys = [spot.index, spot.index - spot.total]
            found = next((self.by_layer[k] for k in keys if k in self.by_layer), None)
            if found is None:
                raise ValueError(
                    f"{self.name} has nothing for layer {spot.name}: it is a mapping with layers "
                    f"{list(self.layers)}; add the layer, or leave it out of layers="
                )
            return found
        rows = len(self.stack)
        if rows == spot.total and not spot.of_model:
            return self.stack[spot.index]
        if rows == spot.count:
            return self.stack[spot.order]
        has = "its site is one of the model" if spot.of_model else f"the model has {spot.total}"
        raise ValueError(f"{self.name} holds {rows} layers, but {has} and the edit acts on {spot.count}")


def _layer_key(name, key):
    if isinstance(key, bool) or not isinstance(key, int):
        raise TypeError(f"{name} is a mapping with key {key!r}, expected layer numbers")
    return key
