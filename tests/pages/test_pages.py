"""Every Python block and every command of the pages: run as they stand, on tiny stand-ins for what a page assumes.

A block that begins with `# needs …` says so to its reader and is left out. Pages with a test of their own are named in OWN.
"""

import copy
import json
import re
import shlex

import pages
import pytest
import tiny_models as tiny
import torch
import typer
from word_tokenizer import tokenizer

import fastedit as fe
from fastedit.cli import app
from fastedit.examples import HAPPY, SAD, lines

OWN = {  # test_adopt_page, test_frameworks_page, test_add_a_family, test_method_pages
    "adopt.md", "frameworks.md", "add-a-family.md", "rahf.md", "recontrol.md",
}  # fmt: skip
GOOD, BAD = ([f"{a} {b} was {word}" for a in ("the", "a", "no") for b in ("cat", "dog", "mat")] for word in ("good", "bad"))


def runnable(page):
    """The blocks of a page that are run here."""
    return [b for b in pages.blocks(page) if not b.code.startswith("# needs ")]


PAGES = [page for page in pages.pages() if page not in OWN and "notebooks" not in page and runnable(page)]


@pytest.fixture(scope="module")
def whole():
    """(model, tokenizer): 24 layers, so that the pages' layer numbers are there; it never ends a reply by itself."""
    said = tokenizer(sorted({word for text in [*GOOD, *BAD, *lines(HAPPY), *lines(SAD)] for word in text.split()}))
    model = tiny.build("llama", vocab_size=len(said), num_hidden_layers=24, max_position_embeddings=256)
    with torch.no_grad():
        model.lm_head.weight.mul_(4.0)
    model.generation_config.eos_token_id = None
    return model, said


def directions(layers=range(24), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return fe.Directions({layer: torch.randn(32, generator=generator) for layer in layers}, about={"site": "block"})


def arguments(folder="run"):
    from transformers import TrainingArguments

    more = {"report_to": "none", "use_cpu": True, "learning_rate": 2e-2}
    return TrainingArguments(folder, max_steps=2, per_device_train_batch_size=2, **more)


def assumed(model, said):
    """What the pages take for granted, by name."""
    inputs = dict(said(GOOD[:2], return_tensors="pt"))
    vectors = torch.eye(32)[:2]
    batch = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    more = {name: torch.cat([value, value[:1]]) for name, value in batch.items()}
    told = [{"prompt": good, "response": "yes"} for good in GOOD]
    return {
        "fe": fe, "fastedit": fe, "torch": torch, "tokenizer": said, "inputs": batch, "batch_of_two": batch,
        "batch_of_three": more,
        "positive": GOOD, "negative": BAD, "texts": GOOD + BAD, "labels": ["good"] * 9 + ["bad"] * 9, "prompts": GOOD[:4],
        "directions": directions(), "other": directions(seed=1), "refusal": directions(seed=2), "condition": vectors[0],
        "c": vectors[0], "medical": fe.Gate(vectors[1], threshold=0.1, layer=7, decide="prompt"), "vectors": vectors,
        "offset": torch.zeros(2), "words": ["w"] * (batch["input_ids"].shape[1] + 19), "answerable": GOOD[:6],
        "conflicting": BAD[:6], "answerable_held_out": GOOD[6:], "conflicting_held_out": BAD[6:],
        "judge": lambda prompt, reply: "no" in reply, "target": copy.deepcopy(model), "aligned": copy.deepcopy(model),
        "harmful": BAD, "harmless": GOOD, "on_topic": GOOD, "off_topic": BAD, "measure": lambda changed: [0.0, 1.0, 1.0],
        "rows": told[:6], "held_out": told[6:], "pairs": [row | {"chosen": "yes", "rejected": "no"} for row in told],
    }  # fmt: skip


def trainers(said):
    """What Trainer is given where a page says `args` and `rows`."""
    from transformers import Trainer

    rows = [{"input_ids": ids, "labels": ids} for ids in said(GOOD)["input_ids"]]
    return {"Trainer": Trainer, "args": arguments(), "rows": rows}


def before_bank(number, names):
    fe.patch(copy.deepcopy(names["model"]), fe.RED()).save("my-edit")
    if number == 0:
        names["handle"] = fe.patch(copy.deepcopy(names["model"]), fe.RED())
    else:
        bank = names["bank"] = fe.Bank(names["model"], capacity=4, sites=("mlp",), rank=1)
        bank.add("anna", "my-edit")
        bank.add("ben", fe.Steer(names["directions"], site="mlp"))


def before_reft(number, names):
    if number == 0:
        names.update(trainers(names["tokenizer"]))
    else:
        batch = names["inputs"]
        names["loader"] = [(batch, [3, None])]
        names["per_sequence_mean"] = lambda logits, given: logits.float().log_softmax(-1).mean((1, 2))


def before_training(number, names):
    if number == 1:
        trl = pytest.importorskip("trl", reason="needs TRL: pip install trl")
        names["DPOTrainer"] = trl.DPOTrainer
        from datasets import Dataset

        names["pairs"] = Dataset.from_list([{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in names["pairs"]])
        names["args"] = trl.DPOConfig("run", max_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True)


def before_readme(number, names):
    if number == 1:
        names.update(trainers(names["tokenizer"]))


def before_methods(number, names):
    with open("lexicons.json", "w") as file:
        json.dump({"kind": {"good": 1.0}}, file)


BEFORE = {
    "bank.md": before_bank, "reft.md": before_reft, "training.md": before_training, "../README.md": before_readme,
    "methods.md": before_methods,
}  # fmt: skip


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, said = whole
    monkeypatch.setitem(fe.__dict__, "chat_model", lambda: (copy.deepcopy(model), said))
    names = assumed(model, said)
    for number, block in enumerate(runnable(page)):
        names["model"] = copy.deepcopy(model)
        if page in BEFORE:
            BEFORE[page](number, names)
        elif "handle" in block.code and not re.search(r"^\s*handle =|as handle", block.code, re.MULTILINE):
            names["handle"] = fe.patch(names["model"], fe.Steer(names["directions"], layers=[8]))
        if page == "methods.md" and "calibrate" in block.code:
            names["handle"] = fe.patch(names["model"], fe.Steer(names["directions"], layers=[8]))
        torch.manual_seed(0)
        exec(compile(block.code, str(block), "exec"), names)


def test_what_is_not_run_says_why():
    left = [b for page in pages.pages() for b in pages.blocks(page) if b.code.startswith("# needs ")]
    assert left and all(re.match(r"# needs [\w ,.-]+\n", b.code) for b in left), left
    for page in OWN:
        assert pages.blocks(page)


@pytest.mark.parametrize("page", [page for page in pages.pages() if pages.commands(page)])
def test_the_commands_of_a_page_are_understood(page):
    """Each names a command and options that there are, with values of the right kind; none is run here."""
    group = typer.main.get_command(app)
    for line in pages.commands(page):
        given = shlex.split(line.replace("\\\n", " "), comments=True)[1:]
        with group.make_context("fastedit", list(given), resilient_parsing=True) as context:
            name, command, rest = group.resolve_command(context, given)
            if "--help" not in rest:
                command.make_context(name, list(rest), parent=context)
