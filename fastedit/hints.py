"""What arguments take, by name, for type hints. Imports torch: fastedit.arrays and fastedit.jax have names of their own."""

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch

Folder: TypeAlias = str | PathLike[str]
"""A path, or where it is said a Hub repo's id."""

Array: TypeAlias = torch.Tensor | np.ndarray | Sequence[float] | Sequence[Sequence[float]]
"""Floating values: a tensor, or what torch.as_tensor takes."""


class HasDirections(Protocol):
    """What other libraries keep vectors in, repeng's ControlVector among them."""

    @property
    def directions(self) -> Mapping[int, Any]: ...


class HasVectors(Protocol):
    """The same under another name."""

    @property
    def vectors(self) -> Mapping[int, Any]: ...


Values: TypeAlias = Array | Mapping[int, Array] | HasDirections | HasVectors
"""One value for all layers, a stack with a leading layer dimension, or a mapping from layer number; Directions too."""

Site: TypeAlias = Literal["embed", "q", "k", "v", "attn", "ffn_in", "mlp", "block", "final"]
Layers: TypeAlias = int | str | slice | Iterable[int | str] | None
WhichTokens: TypeAlias = "str | Mapping[str, Any] | None"
"""positions=: "all", "prompt", "generated", "first 4", "last 4", "mask", joined by " + ", or {"tokens": [ids]}."""

Texts: TypeAlias = Iterable[Any]
"""Texts, chats (lists of messages), rows {"prompt", "response"}, lists of token ids, or ready batches."""

Row: TypeAlias = Mapping[str, Any]
