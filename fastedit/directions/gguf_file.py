"""The GGUF file of a control vector, as llama.cpp and repeng know it: written and read.

The file has architecture "controlvector", `controlvector.model_hint`, `controlvector.layer_count`, and one F32 tensor
"direction.<layer>" per layer. It is added to the residual stream that leaves the layer of that number, counted from 0.
llama.cpp refuses layer 0. repeng numbers layers in the same way.
"""

import os
import re
import secrets
from pathlib import Path

import numpy as np
import torch

from ..files.sealed import Damaged, open_regular

ARCHITECTURE = "controlvector"


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
    temporary = path.parent / f".{path.name}-{secrets.token_hex(8)}.tmp"
    try:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", model)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(vectors))
        for layer, vector in vectors.items():
            writer.add_tensor(f"direction.{layer}", vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
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
            _check_head(file.read(24))
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


def _check_head(head):
    """Check the counts in a header, because the reader reads as many as it announces. A control vector has few."""
    tensors, keys = (int.from_bytes(head[at : at + 8], "little") for at in (8, 16))
    if len(head) == 24 and head[:4] == b"GGUF" and (tensors > 1 << 16 or keys > 1 << 16):
        raise Damaged(f"it announces {tensors:,} tensors and {keys:,} keys")


def _string(reader, name):
    field = reader.get_field(name)
    return None if field is None else bytes(field.parts[-1]).decode(errors="replace")


def _gguf():
    try:
        import gguf
    except ImportError:
        raise ImportError("control vectors in GGUF need the package gguf: pip install gguf") from None
    return gguf
