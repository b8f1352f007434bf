"""RAHF (SCIT) on the chat model, at a tiny size: the preference margin on pairs held out, after each of its two steps.

Fixed before the first run:
    pairs      the 24 of fastedit/examples, helpful against rude; three folds, each of which holds out 8
    teacher    rahf_teachers.teach, mode scit, by RED merged into the weights (published: full fine-tuning): 6 steps of 4 pairs
               at 1e-2
    student    RED on the teacher, rahf.train: 16 steps of 4 rows `chosen` at 5e-3 (published: LoRA, 450 steps of 64 rows)
    control    the same with half of the labels of the fold's pairs flipped at random
    margin     log p(chosen) − log p(rejected) under the neutral prompt, for the model as it is, the teacher, the student;
               gains paired by pair, 95 % intervals over the 24 pairs
"""

import copy
import json
import random

import torch

import fastedit as fe
from fastedit import examples
from fastedit.methods import rahf
from fastedit.methods.rahf_student import margins
from fastedit.methods.rahf_teachers import teach

from .onchat import Loaded, as_chats, average, listed, mean, rounded, share, table
from .rows import Rows

FOLDS, TAUGHT, STEPS, BATCH = (0, 1, 2), {"steps": 6, "lr": 1e-2}, {"steps": 16, "lr": 5e-3}, 4
KEYS, FIELDS = ("labels", "fold"), ("base", "teacher", "student", "distance_before", "distance_after")


def run(out, given=None, first=False):
    rows, loaded = Rows(out / "effects-aligned.csv", KEYS, FIELDS), Loaded(given)
    for fold in FOLDS[: 1 if first else None]:
        for labels in ("true", "shuffled"):
            if not rows.has(labels=labels, fold=fold):
                rows.add({"labels": labels, "fold": fold} | measured(*loaded(), labels, fold))


def measured(model, tokenizer, labels, fold):
    pairs = [{**pair, "prompt": as_chats([pair["prompt"]])[0]} for pair in examples.preferences()]
    held, fitted = pairs[fold :: len(FOLDS)], [pair for n, pair in enumerate(pairs) if n % len(FOLDS) != fold]
    if labels == "shuffled":
        turned = set(random.Random(fold).sample(range(len(fitted)), len(fitted) // 2))
        fitted = [
            {**p, "chosen": p["rejected"], "rejected": p["chosen"]} if n in turned else p for n, p in enumerate(fitted)
        ]
    collator = rahf.Collator(tokenizer, ("", rahf.GOOD, rahf.BAD))
    base = margins(model, collator, held)
    model = copy.deepcopy(model)
    teach(model, tokenizer, fitted, "scit", by="red", batch_size=BATCH, seed=fold, **TAUGHT)
    taught = margins(model, collator, held)
    layers = rahf.default_layers(model.config.num_hidden_layers)
    fe.patch(model, fe.RED(layers=range(max(layers))), freeze=True)
    student, rows = rahf.Rahf(model, layers), rahf.rows_of(fitted, "chosen")

    @torch.no_grad()
    def distance():
        return student.eval()(**collator(rows[:BATCH]))["loss"].item()

    before = distance()
    rahf.train(student, rows, collator, batch_size=BATCH, seed=fold, **STEPS)
    found = {"base": base, "teacher": taught, "student": margins(model, collator, held)}
    return {name: json.dumps(rounded(some)) for name, some in found.items()} | {
        "distance_before": before, "distance_after": distance()
    }  # fmt: skip


# --- the page ---------------------------------------------------------------------------------------------------------


def markdown(path):
    rows, lines = Rows(path, KEYS, FIELDS).read(), []
    for labels, title in (("true", "as they are"), ("shuffled", "half of the labels flipped")):
        own = [row for row in rows if row["labels"] == labels]
        if not own:
            lines.append([title])
            continue
        for name, text in (("base", "the model"), ("teacher", "teacher"), ("student", "student")):
            if name == "base" and labels == "shuffled":
                continue
            margins, base = listed(own, name), listed(own, "base")
            lines.append([
                title, text,
                share(sum(margin > 0 for margin in margins), len(margins)),
                mean(margins, digits=1),
                "" if name == "base" else mean([a - b for a, b in zip(margins, base, strict=True)], sign=True, digits=1),
                " → ".join(average(own, f"distance_{end}", 1) for end in ("before", "after")) if name == "student" else "",
            ])  # fmt: skip
    return table(["pairs", "", "chosen preferred", "margin", "gain", "distance to the targets"], lines)
