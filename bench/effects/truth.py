"""TruthfulQA's multiple choice with and without edits: does a dose that steers do harm?

Fixed before the first run:
    questions  200 of the 817, the first by the SHA-256 of their text; each is the user's turn of the chat model, without
               examples before it and without a system turn of ours, which is not the published setting
    scores     the sum of log p of an answer's tokens. MC1: whether the true answer of mc1 has the largest; MC2: the share
               of the true answers of mc2 in the sum of all their probabilities
    edits      none; the mood direction of chat.py at its layers, 0.2 nats; random directions (seeds 0, 1) at the same KL;
               RED trained by DPO on the first fold of preferred.py, trained again here
    intervals  over questions; differences with less without the edit, paired by question
"""

import hashlib
import json

import torch
from transformers import DynamicCache

import fastedit as fe
from fastedit import examples
from fastedit.directions.sweep import random_like
from fastedit.patching.eval_mode import evaluating
from fastedit.texts.chat import prompt_ids

from . import chat, preferred
from .onchat import Loaded, as_chats, average, calibrated, gained, kl_of, listed, mean, rounded, share, table
from .rows import Rows

QUESTIONS, DOSE = 200, 0.2
PLAN = (("none", 0), ("direction", 0), ("random", 0), ("dpo", 0), ("random", 1))
KEYS, FIELDS = ("edit", "seed"), ("strength", "kl", "questions", "mc1", "mc2")


def run(data, out, given=None, first=False):
    rows, loaded = Rows(out / "effects-truth.csv", KEYS, FIELDS), Loaded(given)
    asked = questions(data)
    for edit, seed in PLAN[: 3 if first else None]:
        if not rows.has(edit=edit, seed=seed):
            rows.add({"edit": edit, "seed": seed} | measured(*loaded(), asked, edit, seed))


def questions(data):
    found = json.loads((data / "data" / "truthfulqa" / "mc_task.json").read_text())
    return sorted(found, key=lambda one: hashlib.sha256(one["question"].encode()).digest())[:QUESTIONS]


def measured(model, tokenizer, asked, edit, seed):
    strength = kl = 0.0
    chats = as_chats(examples.lines(examples.PROMPTS))
    handle = None
    if edit == "dpo":
        handle = preferred.trained(model, tokenizer, "dpo red", 0)
    elif edit != "none":
        found = chat.directions_of(model, tokenizer, *chat.sides_of("mood")[:2])
        own = found.at(*found.window(-(-len(found) // 3)))
        handle = fe.patch(model, fe.Steer(own if edit == "direction" else random_like(own, seed), site="block"))
        calibrated(model, tokenizer, handle, chats, DOSE)
    if handle is not None:
        strength, kl = handle.strength, kl_of(model, tokenizer, handle, chats)
    try:
        both = [judged(one, log_ps(model, tokenizer, one["question"], answers_of(one))) for one in asked]
    finally:
        if handle is not None:
            handle.remove()
    mc1, mc2 = zip(*both, strict=True)
    return {
        "strength": float(strength), "kl": kl, "questions": len(asked), "mc1": json.dumps(mc1),
        "mc2": json.dumps(rounded(mc2, 4)),
    }  # fmt: skip


def answers_of(one):
    return list(dict.fromkeys([*one["mc1_targets"], *one["mc2_targets"]]))


@torch.no_grad()
def log_ps(model, tokenizer, question, answers):
    """{answer: the sum of log p of its tokens}. The question is read once, the answers behind it as a batch."""
    before = prompt_ids(tokenizer, as_chats([question])[0])
    behind = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
    longest, cache = max(map(len, behind)), DynamicCache()
    with evaluating(model):
        first = model(torch.tensor([before]), past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        cache.batch_repeat_interleave(len(behind))
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids in behind])
        mask = torch.tensor([[1] * (len(before) + len(ids)) + [0] * (longest - len(ids)) for ids in behind])
        logits = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits
    said = torch.cat([first.expand(len(behind), 1, -1), logits[:, :-1]], 1).float().log_softmax(-1)
    said = said.gather(2, ids[..., None])[..., 0] * mask[:, len(before) :]
    return dict(zip(answers, said.double().sum(1).tolist(), strict=True))


def judged(one, found):
    """(MC1, 0 or 1; MC2) of a question."""
    best = max(one["mc1_targets"], key=found.get)
    truths = torch.tensor([bool(true) for true in one["mc2_targets"].values()])
    shares = torch.tensor([found[answer] for answer in one["mc2_targets"]], dtype=torch.float64).softmax(0)
    return int(one["mc1_targets"][best]), shares[truths].sum().item()


# --- the page ---------------------------------------------------------------------------------------------------------

NAMES = {
    "none": "no edit", "direction": "mood direction", "random": "random direction", "dpo": "RED by DPO (towards sad)",
}  # fmt: skip


def markdown(path):
    rows = {(row["edit"], int(row["seed"])): row for row in Rows(path, KEYS, FIELDS).read()}
    lines = []
    for key in PLAN:
        line = [NAMES[key[0]] + (f", seed {key[1]}" if key[0] == "random" else "")]
        if key in rows:
            own, base = [rows[key]], [rows["none", 0]]
            mc1, mc2 = listed(own, "mc1"), listed(own, "mc2")
            apart = ["" if key[0] == "none" else gained(own, base, field, 3) for field in ("mc1", "mc2")]
            line += [average(own, "kl", 2), share(sum(mc1), len(mc1)), apart[0], mean(mc2, digits=3), apart[1]]
        lines.append(line)
    return table(["", "nats a token", "MC1", "difference", "MC2", "difference"], lines)
