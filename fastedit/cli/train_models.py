"""Loading a model to train: device, dtype, device map, quantisation; and how the Trainer is told of them."""

import typer

SIZES = {
    "device": "auto", "dtype": None, "device_map": None, "quantize": None, "accumulate": 1, "checkpointing": False,
    "resume": False,
}  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16")


def load(kind, name, *, device, dtype, device_map, quantize):
    """(model, tokenizer) by an Auto class's name; a mistake in a name or an option is one line."""
    import torch
    import transformers

    from .progress import quiet

    quiet()
    if dtype not in (None, *DTYPES):
        raise typer.BadParameter(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    options = {"dtype": getattr(torch, dtype)} if dtype else {}
    if device_map is not None:
        options["device_map"] = device_map
    if quantize is not None:
        options["quantization_config"] = _quantized(quantize, options.get("dtype"))
    place = device_of(device)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = getattr(transformers, kind).from_pretrained(name, **options)
    except (OSError, ValueError, ImportError) as error:
        raise typer.BadParameter(f"{name} could not be loaded: {error}") from None
    if device_map is None and quantize is None:
        model.to(place)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


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
    import importlib.util

    if bits not in ("8bit", "4bit"):
        raise typer.BadParameter(f"quantize is {bits!r}, expected 8bit or 4bit")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise typer.BadParameter("--quantize needs bitsandbytes: pip install bitsandbytes")
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
