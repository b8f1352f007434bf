"""Every command of docs/methods.md, with the flags on the page, on tiny models in place of those it names."""

import re
import shlex
from pathlib import Path

import pytest
import tiny_models
import torch
from test_cli import invoke
from word_tokenizer import tokenizer

from fastedit.interop import smollm2

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    "happy": "what a good day", "sad": "what a bad day", "can": "is the cat good ?", "cannot": "is the moon bad ?",
    "phrases": "no", "harmful": "a bad dog", "harmless": "a good dog", "sport": "who won the game ?", "other": "who ate it ?",
}  # fmt: skip


def commands(page):
    """[[argument, …]] of the lines that begin with fastedit, continued ones joined."""
    text = (ROOT / "docs" / page).read_text().replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in re.findall(r"^    (fastedit .*)$", text, re.MULTILINE)]


def model(folder, layers):
    """A tiny Llama whose head is sharp enough for the page's doses."""
    examples = (ROOT / "fastedit" / "examples").glob("*.txt")
    words = {word for text in [*FILES.values(), *(path.read_text() for path in examples)] for word in text.split()}
    said = tokenizer(sorted(words))
    made = tiny_models.build("llama", vocab_size=len(said), num_hidden_layers=layers, max_position_embeddings=256)
    with torch.no_grad():
        made.lm_head.weight.mul_(8.0)
    made.save_pretrained(folder)
    said.save_pretrained(folder)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with what the page's commands read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fastedit").symlink_to(ROOT / "fastedit")
    for name, text in FILES.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{text} {word}" for word in ["so", "very", "big", "small", "red", "on"]))
    chat = model(tmp_path / "chat", 6)
    for name in ("target", "aligned"):
        (tmp_path / name).symlink_to(chat)
    monkeypatch.setattr(smollm2, "chat_folder", lambda: chat)
    return tmp_path


def test_the_commands_of_the_methods_page(here):
    wide, ran = model(here / "wide", 16), []
    for arguments in commands("methods.md"):
        given = [str(wide) if a == "meta-llama/Llama-3.1-8B-Instruct" else a for a in arguments]
        if given[0] == "generate" or given[0] == "roleref":
            given += ["--max-new-tokens", "2"]
        elif given[0] == "inferaligner":
            given += ["--at-least", "0"]  # a random model's gates are guesses
        invoke(*given)
        ran.append(given[0])
    assert ran.count("contrast") == ran.count("generate") - 1 == 2
    assert {"roleref", "inferaligner", "cast", "ubpl"} <= set(ran)
    assert {path.name for path in here.glob("*/edit.json")} == {"edit.json"} and (here / "lexicons.json").exists()
