"""Every command of the pages, with the flags on the page, on tiny models of the architectures in place of those it names."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import tiny_chat
import tiny_models
import torch
from test_cli import invoke
from transformers import BertTokenizer, Qwen2Config, Qwen2ForCausalLM

import fastedit as fe
from fastedit.interop import smollm2

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("methods.md", "recontrol.md", "rahf.md", "reft.md", "training.md")
FILES = {
    "happy": "what a good day", "sad": "what a bad day", "harmful": "a bad dog", "harmless": "a good dog",
    "prompts": "what is a dog",
}  # fmt: skip
ENDS = ("so", "very", "big", "small", "red", "on")
SMALLER = {  # what a page leaves at a published size
    "generate": ["--max-new-tokens", "2"],
    "predict": ["--max-new-tokens", "2"],
    "roleref": ["--max-new-tokens", "2"],
    "inferaligner": ["--at-least", "0"],  # a random model's gates are guesses
    "recontrol": ["--max-new-tokens", "4", "--units", "16", "--epochs", "2"],
    "rahf": ["--teacher-steps", "2", "--steps", "2", "--batch-size", "2"],
    "vector": ["--epochs", "1"],
}


def commands(page):
    """[[argument, …]] of the lines that begin with fastedit, continued ones joined."""
    text = (ROOT / "docs" / page).read_text().replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in re.findall(r"^    (fastedit .*)$", text, re.MULTILINE)]


def llama(layers):
    return lambda folder: tiny_chat.save(folder, layers, FILES.values())


def qwen(folder):
    model, said = tiny_chat.build(4, FILES.values())
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = {name: getattr(model.config, name) for name in (*kept, "pad_token_id", "bos_token_id", "eos_token_id")}
    Qwen2ForCausalLM(Qwen2Config(**config, max_position_embeddings=256)).save_pretrained(folder)
    said.save_pretrained(folder)
    return folder


def roberta(folder):
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *tiny_chat.words(FILES.values())]))
    said = BertTokenizer(str(folder / "vocab.txt"))
    tiny_models.build("roberta", vocab_size=len(said)).base_model.save_pretrained(folder)
    said.save_pretrained(folder)
    return folder


BIG = {
    "meta-llama/Llama-3.1-8B-Instruct": llama(16), "meta-llama/Meta-Llama-3-8B-Instruct": llama(3), "./model": llama(3),
    "Qwen/Qwen2.5-0.5B-Instruct": qwen, "FacebookAI/roberta-base": roberta, "./encoder": roberta,
    "minilm": roberta,
}  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with what the pages' commands read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fastedit").symlink_to(ROOT / "fastedit")
    for name, text in FILES.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{text} {word}" for word in ENDS))
    pairs = [{"prompt": f"what is {word}", "chosen": f"a good {word}", "rejected": f"a bad {word}"} for word in ENDS * 2]
    rows = {
        "pairs": pairs, "prefs": pairs, "questions": [{"prompt": p["prompt"], "response": p["chosen"]} for p in pairs],
        "chats": [{"messages": [turn("user", p["prompt"]), turn("assistant", p["chosen"])]} for p in pairs],
    }  # fmt: skip
    for name, found in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    marks = [("good", "yes"), ("bad", "no")] * 10
    (tmp_path / "reviews.tsv").write_text("text\tlabel\n" + "".join(f"a {a} dog\t{b}\n" for a, b in marks))
    (tmp_path / "pairs.tsv").write_text(
        "premise\thypothesis\tlabel\n" + "".join(f"a {a} dog\tit is {a}\t{b}\n" for a, b in marks)
    )
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)  # another test's
    (tmp_path / "my_rewards.py").write_text("def helpful(prompts, responses):\n    return [len(r) for r in responses]\n")
    chat = llama(10)(tmp_path / "chat")
    for name in ("target", "aligned"):
        (tmp_path / name).symlink_to(chat)
    monkeypatch.setattr(smollm2, "chat_folder", lambda: chat)
    return tmp_path


def turn(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page(page, here):
    if page != "methods.md":
        (here / "aligned").unlink()  # other pages' commands make it
    made, ran = {}, []
    for arguments in commands(page):
        given = list(arguments)
        for number, name in enumerate(arguments):
            if name in BIG:
                made[name] = made.get(name) or BIG[name](here / f"tiny {len(made)}")
                given[number] = str(made[name])
        what = next((name for name in ("recontrol", "rahf", "vector") if name in given), given[0])
        given += [] if "--teacher-steps" in given else SMALLER.get(what, [])
        if "--out" in given:
            shutil.rmtree(here / given[given.index("--out") + 1], ignore_errors=True)  # of an earlier command
        invoke(*given)
        ran.append(what)
    assert set(ran) >= {
        "methods.md": {"contrast", "generate", "roleref", "inferaligner", "cast", "ubpl"},
        "recontrol.md": {"recontrol", "generate"}, "rahf.md": {"rahf", "generate"}, "reft.md": {"train"},
        "training.md": {"train", "predict", "evaluate", "vector", "recontrol"},
    }[page]  # fmt: skip


def test_the_lines_for_a_model_of_the_hub_on_recontrol(monkeypatch):
    """On a tiny Llama, with a judge that gives the texts' lengths."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "recontrol.md").read_text(), re.DOTALL | re.MULTILINE)
    (block,) = (text for text in blocks if "Meta-Llama-3-8B" in text)
    model, tokenizer = tiny_chat.build(3, FILES.values())

    class Auto:
        def __init__(self, found):
            self.found = found

        def from_pretrained(self, name, **options):
            assert name == "meta-llama/Meta-Llama-3-8B-Instruct"
            return self.found

    def pipeline(task, name, **options):
        return lambda pairs: [{"score": float(len(pair["text_pair"]))} for pair in pairs]

    names = {
        "torch": torch, "fe": fe, "recontrol": fe.methods.recontrol, "AutoModelForCausalLM": Auto(model), "pipeline": pipeline,
        "AutoTokenizer": Auto(tokenizer), "prompts": ["what is a dog", "is the cat good ?"] * 4,
    }  # fmt: skip
    monkeypatch.setattr(names["recontrol"].Trajectories, "save", lambda self, path: None)
    exec(compile(block, "recontrol.md", "exec"), names)
    assert isinstance(names["handle"], fe.patching.handle.Handle) and names["trajectories"].rewards.std() > 0
