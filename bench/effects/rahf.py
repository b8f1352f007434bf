"""RAHF on rows that it fits and on others: the mean distance to the targets.

The student is RED on a stories260K that has seen no hindsight step, 30 steps of 4 rows; the first 8 rows of
preference_pairs with a prompt under 100 letters are fitted, the next 64 held out. The seed orders the rows.
"""

import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastedit as fe
from fastedit.methods import rahf

from .rows import Rows

KEYS, FIELDS = ("seed",), ("fitted_before", "fitted_after", "held_out_before", "held_out_after", "held_out")


def run(data, out, seeds=(0, 1, 2), steps=30):
    rows = Rows(out / "effects-rahf.csv", KEYS, FIELDS)
    for seed in seeds:
        if not rows.has(seed=seed):
            rows.add({"seed": seed} | measure(data, seed, steps))


def measure(data, seed, steps):
    torch.manual_seed(seed)
    folder = data / "models" / "stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    pairs = json.loads((data / "data" / "preference_pairs" / "dpo_en_demo.json").read_text())
    rows = [{"prompt": p["conversations"][0]["value"], "response": p["chosen"]["value"]} for p in pairs]
    rows = [row for row in rows if len(row["prompt"]) < 100]
    fitted, held_out = rows[:8], rows[8:72]
    layers = rahf.default_layers(len(model.model.layers))
    fe.patch(model, fe.RED(layers=range(max(layers))), freeze=True)
    student = rahf.Rahf(model, layers)
    collator = rahf.Collator(tokenizer, ("", rahf.GOOD, rahf.BAD), response=32)

    @torch.no_grad()
    def distance(chosen):
        return student.eval()(**collator(chosen))["loss"].item()

    before = distance(fitted), distance(held_out)
    rahf.train(student, fitted, collator, steps=steps, batch_size=4, lr=5e-3, seed=seed)
    after = distance(fitted), distance(held_out)
    return {
        "fitted_before": before[0], "fitted_after": after[0], "held_out_before": before[1], "held_out_after": after[1],
        "held_out": len(held_out),
    }  # fmt: skip


def markdown(path):
    lines = ["| seed | 8 rows fitted | rows held out |", "|---|---|---|"]
    for row in Rows(path, KEYS, FIELDS).read():
        number = {name: float(row[name]) for name in FIELDS}
        lines.append(
            f"| {row['seed']} | {number['fitted_before']:.3f} → {number['fitted_after']:.3f} | "
            f"{number['held_out_before']:.3f} → {number['held_out_after']:.3f} ({number['held_out']:.0f} rows) |"
        )
    return "\n".join(lines)
