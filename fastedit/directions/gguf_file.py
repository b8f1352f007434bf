"""The GGUF file of a control vector, as llama.cpp and repeng know it: written and read.

The file has architecture "controlvector", `controlvector.model_hint`, `controlvector.layer_count`, and one F32 tensor
"direction.<layer>" per layer. It is added to the residual stream that leaves the layer of that number, counted from 0.
llama.cpp refuses layer 0. repeng numbers layers in the same way.
"""

import os
import re
import tempfile
from pathlib import Path

import numpy as np
import torch

from ..files.edit_file import replace
from ..files.sealed import Damaged, open_regular

ARCHITECTURE = "controlvector"
_STRING, _ARRAY = 8, 9
_SIZES = (1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8)  # of a value, by its kind's number in GGUF


def write(path, vectors, model):
    """Write {layer: vector (width,) fp32} as a control vector. A crash leaves the old file or the new one. Returns the
    Path.

    Args:
        model: llama.cpp's name of the architecture, for model_hint.

    Raises:
        ImportError: no `gguf` package. OSError: it could not be written.
    """
    gguf = _gguf()
    path = Path(path)
    with tempfile.TemporaryDirectory() as made:
        writer = gguf.GGUFWriter(Path(made, path.name), ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", model)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(vectors))
        for layer, vector in vectors.items():
            writer.add_tensor(f"direction.{layer}", vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        replace(path, Path(made, path.name).read_bytes())
    return path


def read(path):
    """({layer: vector (width,) fp32}, about) of a control vector's file.

    Raises:
        Damaged: it is not a GGUF file or not a control vector, or it holds a tensor that is no vector.
        ImportError: no `gguf` package.
    """
    gguf = _gguf()
    try:
        with open_regular(path, 4 << 30) as file:
            _check_header(file)
        reader = gguf.GGUFReader(path)
        architecture = _string(reader, "general.architecture")
        hint = _string(reader, f"{ARCHITECTURE}.model_hint")
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever a damaged header makes of the reader
        raise Damaged(f"{path} is not a GGUF file: {error!s:.200}") from None
    if architecture != ARCHITECTURE:
        raise Damaged(f"{path} has architecture {architecture!r}, expected {ARCHITECTURE!r}")
    vectors = {}
    for tensor in reader.tensors:
        number = re.fullmatch(r"direction\.(\d+)", tensor.name)
        if not number or len(number[1]) > 9 or tensor.data.dtype != np.float32 or tensor.data.ndim != 1:
            raise Damaged(
                f"{path}: tensor {tensor.name!r} is {tensor.data.dtype} {tensor.data.shape}, expected F32 vectors "
                "direction.<layer>"
            )
        vectors[int(number[1])] = torch.from_numpy(np.array(tensor.data))
    return vectors, {"site": "block", "type": hint}


def _check_header(file):
    """That the file holds the keys its header announces, and few: gguf's reader goes on behind the end, as far as it is told."""
    if file.read(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    _number(file, 4)
    _few("tensors", _number(file, 8))
    for _ in range(_few("keys", _number(file, 8))):
        _skip(file, _number(file, 8))
        _skip_value(file, _number(file, 4))


def _skip_value(file, kind):
    if kind == _ARRAY:
        kind = _number(file, 4)
        for _ in range(_few("values in an array", _number(file, 8))):
            _skip_value(file, kind)
    elif kind == _STRING:
        _skip(file, _number(file, 8))
    elif kind < len(_SIZES):
        _skip(file, _SIZES[kind])
    else:
        raise ValueError(f"it has a value of the unknown kind {kind}")


def _number(file, size):
    found = file.read(size)
    if len(found) < size:
        raise ValueError("it ends within its header")
    return int.from_bytes(found, "little")


def _skip(file, size):
    if size > os.fstat(file.fileno()).st_size - file.tell():
        raise ValueError("it ends within its header")
    file.seek(size, os.SEEK_CUR)


def _few(what, count):
    if count > 1 << 16:
        raise ValueError(f"it announces {count:,} {what}")
    return count


def _string(reader, name):
    field = reader.get_field(name)
    return None if field is None else bytes(field.parts[-1]).decode(errors="replace")


def _gguf():
    try:
        import gguf
    except ImportError:
        raise ImportError("control vectors in GGUF need the package gguf: pip install gguf") from None
    return gguf
