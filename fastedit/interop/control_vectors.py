"""Control vectors of repeng and llama.cpp as Directions, and back. directions/gguf_file.py reads and writes the
file."""

import numpy as np
import torch

from ..directions.directions import Directions


def save_gguf(directions, path, *, model=None):
    """`Directions.save_gguf`."""
    return directions.save_gguf(path, model=model)


def load_gguf(path):
    """`Directions.load_gguf`."""
    return Directions.load_gguf(path)


def from_repeng(vector):
    """Directions of a repeng ControlVector (or anything with `directions` {layer: array} and `model_type`)."""
    found = getattr(vector, "directions", None)
    if not isinstance(found, dict):
        raise TypeError(f"expected a repeng ControlVector with directions {{layer: array}}, found {type(vector).__name__}")
    vectors = {int(layer): torch.from_numpy(np.array(array, dtype=np.float32)) for layer, array in found.items()}
    return Directions(vectors, about={"site": "block", "type": getattr(vector, "model_type", None)})
