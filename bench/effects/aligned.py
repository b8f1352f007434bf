"""RAHF (SCIT) on the chat model, at a tiny size: the preference margin on pairs held out, after each of its two steps.

Fixed before the first run:
    pairs      the 24 of fastedit/examples, helpful against rude; three folds, each of which holds out 8
    teacher    rahf_teachers.teach, mode scit, by RED merged into the weights (published: full fine-tuning): 6 steps of 4 pairs
               at 1e-2
    student    RED on the teacher, rahf.train: 16 steps of 4 rows `chosen` at 5e-3 (published: LoRA, 450 steps of 64 rows)
    control    the same with half of the fold's pairs turned round at random
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

from .onchat import Loaded, as_chats, mean, rounded, share
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
    rows = Rows(path, KEYS, FIELDS).read()
    lines = ["| pairs | | chosen preferred | margin | gain | distance to the targets |", "|---" * 6 + "|"]
    for labels in ("true", "shuffled"):
        own = [row for row in rows if row["labels"] == labels]
        title = {"true": "as they are", "shuffled": "half turned round"}[labels]
        if not own:
            lines.append(f"| {title} | not run | | | | |")
            continue
        found = {name: [v for row in own for v in json.loads(row[name])] for name in ("base", "teacher", "student")}
        ends = [sum(float(row[f"distance_{name}"]) for row in own) / len(own) for name in ("before", "after")]
        for name, text in (("base", "the model"), ("teacher", "teacher"), ("student", "student")):
            if name == "base" and labels == "shuffled":
                continue
            gain = "" if name == "base" else mean([a - b for a, b in zip(found[name], found["base"], strict=True)], True, 1)
            far = f"{ends[0]:.1f} → {ends[1]:.1f}" if name == "student" else ""
            preferred = share(sum(v > 0 for v in found[name]), len(found[name]))
            lines.append(f"| {title} | {text} | {preferred} | {mean(found[name], digits=1)} | {gain} | {far} |")
    return "\n".join(lines)
