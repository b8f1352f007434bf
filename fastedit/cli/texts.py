"""Texts and layer numbers as the command line takes them."""

import json
from pathlib import Path

import typer

from ..arguments import layers_of_text
from ..texts.chat import ANSWERS, CHATS, read_conversation
from ..texts.data_files import read_rows
from .loading import load_model

__all__ = ["as_chat", "layer_numbers", "load_model", "read_texts"]


def read_texts(path):
    """A file's contents as a list: texts, chat conversations (lists of messages), or rows {"prompt", "response"}.

    .txt: one text per line. .json: a list of any of them. .jsonl, .parquet, .csv, .tsv: rows with "text" or "sentence",
    with "messages" or "conversations", or with "prompt" and, if it is known, "response".
    """
    path = Path(path)
    try:
        if path.suffix not in (".json", ".jsonl", ".parquet", ".csv", ".tsv"):
            found = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        elif path.suffix == ".json":
            found = json.loads(path.read_text(encoding="utf-8"))
        else:
            found = read_rows(path)
        if not isinstance(found, list) or not found:
            raise ValueError(
                "it holds no list of texts; use one per line, a JSON list, or .jsonl with \"text\", \"messages\" or \"prompt\""
            )
        return [_text(item, f"item {number} of {path}") for number, item in enumerate(found, 1)]
    except (OSError, ValueError, TypeError) as error:
        raise typer.BadParameter(f"{path} could not be read as texts: {error}") from None


def _text(item, where):
    if isinstance(item, dict):
        for name in ("text", "sentence"):
            if isinstance(item.get(name), str):
                return item[name]
        for name in CHATS:
            if name in item:
                return read_conversation(item[name], f"{where}, column {name!r}")
        if "prompt" in item:
            answered = any(name in item for name in ANSWERS)
            return dict(item) if answered else _text(item["prompt"], f"{where}, column 'prompt'")
        raise ValueError(f"{where} has the columns {', '.join(map(str, item))}, expected text, messages or prompt")
    if isinstance(item, list):
        return read_conversation(item, where)
    if not isinstance(item, str):
        raise ValueError(f"{where} is {item!r:.40}, expected a text or a list of messages")
    return item


def as_chat(texts, system=None):
    """Strings as user turns. `system` becomes the system turn of those and of messages that have none."""
    made = []
    for item in texts:
        if isinstance(item, dict):
            raise typer.BadParameter("--chat and --system are for prompts; these rows hold responses")
        messages = [{"role": "user", "content": item}] if isinstance(item, str) else list(item)
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        made.append(messages)
    return made


def layer_numbers(text):
    """None, or the numbers of "8-15", "3" or "0,4,-1"."""
    try:
        return None if text is None else layers_of_text(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
