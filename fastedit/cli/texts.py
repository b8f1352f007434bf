"""Texts and layer numbers as the command line takes them."""

import json
from pathlib import Path

import typer


def read_texts(path):
    """The texts of a file: one a line (.txt), a JSON list of strings (.json), or objects with "text" (.jsonl)."""
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            texts = json.loads(content)
        elif path.suffix == ".jsonl":
            texts = [json.loads(line)["text"] for line in content.splitlines() if line.strip()]
        else:
            texts = [line for line in content.splitlines() if line.strip()]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise typer.BadParameter(f"{path} could not be read as texts: {error!r}") from None
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise typer.BadParameter(f"{path} holds no list of texts; one a line, a JSON list, or .jsonl with \"text\"")
    return texts


def layer_numbers(text):
    """None, or the numbers of "8-15", "3" or "0,4,-1"."""
    if text is None:
        return None
    numbers = []
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-") if not part.strip().startswith("-") else (part, "", "")
            numbers += range(int(first), int(last) + 1) if dash else [int(first)]
    except ValueError:
        raise typer.BadParameter(f"layers is {text!r}, expected numbers such as 3, 8-15 or 0,4,-1") from None
    if not numbers:
        raise typer.BadParameter(f"layers is {text!r}, which names no layer")
    return numbers


def load_model(name):
    """(model, tokenizer) of a causal language model; a mistake in the name is one line."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .progress import quiet

    quiet()
    try:
        return AutoModelForCausalLM.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{name} could not be loaded: {error}") from None
