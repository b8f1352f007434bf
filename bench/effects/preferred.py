"""DPO and BiPO on the chat model, with RED and with a vector, against the model's own inclination.

Fixed before the first run:
    pairs      line k of the 40 sad sentences of fastedit/examples is chosen, line k of the 40 happy ones rejected, as
               answers to its 32 prompts, which ask for neither. The model by itself prefers the happy sentence nearly
               always, so that there is something to learn
    folds      two: half of the sentences and half of the prompts train, the other halves are held out, then the reverse.
               Every pair is held out once, after a prompt that is held out
    training   fastedit.training.prefer: β = 0.1, 10 steps of 4 pairs, a cosine; RED at all layers, the vector at the
               output of block 10. The rates are not tuned: RED's is the command line's of SFT; the vector's moves each of its
               numbers by at most 2.5 in these steps, its length to at most 60, where a residual is some 200 long
    controls   DPO with RED on the same pairs, half of their labels flipped at random; a random vector at the KL of DPO's
               vector; asking for it in the system turn; no edit. BiPO's vector also at strength −1
    accuracy   share of held-out pairs with log p(chosen) > log p(rejected), sums over the answers
    gain       the same difference in nats, less that without an edit, pair by pair
    replies    one of 16 tokens to each prompt held out, temperature 0.8, the same random numbers in every cell; a hit has
               more sad words than happy ones (moods.json)
    nats       the dose: KL a token over 16 tokens of continuations of 8 prompts of the training half
"""

import json
import random
import tempfile
from pathlib import Path

import torch

import fastedit as fe
from fastedit import examples, training
from fastedit.training.reference import at_strength

from . import chat
from .onchat import (
    TOKENS,
    Loaded,
    as_chats,
    average,
    calibrated,
    gained,
    kl_of,
    listed,
    margins,
    rounded,
    share,
    share_of,
    table,
)
from .rows import Rows

FOLDS, STEPS, PAIRS, BETA, LAYER = (0, 1), 10, 4, 0.1, 10
RATES = {"red": 2e-2, "vector": 0.5}
SYSTEM = "You are a gloomy assistant. Answer in a sad mood."
KEYS, FIELDS = ("condition", "fold"), ("kl", "margins", "replies", "hits", "opposite", "example")
CONDITIONS = {
    "none": "no edit", "dpo red": "DPO, RED", "dpo vector": "DPO, vector", "bipo vector": "BiPO, vector",
    "bipo vector -1": "the same at strength −1", "random": "random vector, KL of DPO's", "asked": "asked in the system turn",
    "bipo red": "BiPO, RED", "dpo red shuffled": "DPO, RED, half of the labels flipped",
}  # fmt: skip


def run(out, given=None, first=False):
    rows, loaded = Rows(out / "effects-preferred.csv", KEYS, FIELDS), Loaded(given)
    with tempfile.TemporaryDirectory(prefix="fastedit-preferred-") as folder:
        for fold in FOLDS[: 1 if first else None]:
            for condition in CONDITIONS:
                if not rows.has(condition=condition, fold=fold):
                    for name, values in measured(*loaded(), rows, condition, fold, folder):
                        if not rows.has(condition=name, fold=fold):
                            rows.add({"condition": name, "fold": fold} | values)


def dealt(fold, system=None):
    """(pairs to train on, pairs held out, prompts to train on, prompts held out)."""
    happy, sad, prompts = (examples.lines(path) for path in (examples.HAPPY, examples.SAD, examples.PROMPTS))
    numbers, asked = list(range(len(happy))), list(prompts)
    draw = random.Random(0)
    draw.shuffle(numbers)
    draw.shuffle(asked)
    halves = [(numbers[k::2], asked[k::2]) for k in (0, 1)]

    def rows(half):
        return [
            {"prompt": as_chats([half[1][n % len(half[1])]], system)[0], "chosen": sad[k], "rejected": happy[k]}
            for n, k in enumerate(half[0])
        ]

    train, held = halves[1 - fold], halves[fold]
    return rows(train), rows(held), train[1], held[1]


def trained(model, tokenizer, condition, fold, folder=None):
    """The handle of an edit trained on a fold's pairs. folder: for the reference's log-probabilities, shared by the cells."""
    loss, method, *shuffled = condition.split()
    pairs = dealt(fold)[0]
    if "shuffled" in shuffled:
        turned = set(random.Random(fold).sample(range(len(pairs)), len(pairs) // 2))
        pairs = [
            {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if n in turned else row for n, row in enumerate(pairs)
        ]
    edit = fe.RED() if method == "red" else fe.ScaleBias(scale=False, site="block", layers=LAYER)
    handle = fe.patch(model, edit, freeze=True)
    stored = None if folder is None else Path(folder) / f"reference {fold}{' shuffled' * len(shuffled)}.safetensors"
    training.prefer(
        handle, tokenizer, pairs, loss=loss, beta=BETA, lr=RATES[method], batch_size=PAIRS, max_steps=STEPS, seed=fold,
        stored=stored,
    )  # fmt: skip
    return handle


def measured(model, tokenizer, rows, condition, fold, folder):
    """(condition, its values) of a cell; BiPO's vector gives two."""
    chats = as_chats(dealt(fold)[2])
    if condition in ("none", "asked"):
        yield condition, judged(model, tokenizer, fold, 0.0, SYSTEM if condition == "asked" else None)
        return
    if condition == "random":
        (same,) = [r for r in rows.read() if (r["condition"], r["fold"]) == ("dpo vector", str(fold))]
        vector = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(fold))
        handle = fe.patch(model, fe.Steer(vector, site="block", layers=LAYER))
        calibrated(model, tokenizer, handle, chats, float(same["kl"]))
    else:
        handle = trained(model, tokenizer, condition.removesuffix(" -1"), fold, folder)
    try:
        for name in ("bipo vector", "bipo vector -1") if condition.startswith("bipo vector") else (condition,):
            with at_strength(handle, -handle.strength if name.endswith(" -1") else handle.strength):
                kl = kl_of(model, tokenizer, handle, chats)
                yield name, judged(model, tokenizer, fold, kl)
    finally:
        handle.remove()


def judged(model, tokenizer, fold, kl, system=None):
    _, held, _, prompts = dealt(fold, system)
    said = chat.sampled(model, tokenizer, as_chats(prompts, system), fold, TOKENS)
    counted = [examples.tally(text, examples.moods()) for text in said]
    return {
        "kl": kl, "margins": json.dumps(rounded(margins(model, tokenizer, held))), "replies": len(said),
        "hits": sum(n["sad"] > n["happy"] for n in counted), "opposite": sum(n["happy"] > n["sad"] for n in counted),
        "example": " ".join(said[0].split()),
    }  # fmt: skip


# --- the page ---------------------------------------------------------------------------------------------------------


def markdown(path):
    rows = Rows(path, KEYS, FIELDS).read()
    lines = []
    for condition, name in CONDITIONS.items():
        own = [row for row in rows if row["condition"] == condition]
        if own:
            base = [one for row in own for one in rows if (one["condition"], one["fold"]) == ("none", row["fold"])]
            margins = listed(own, "margins")
            lines.append([
                name,
                "" if condition in ("none", "asked") else average(own, "kl", 2),
                share(sum(margin > 0 for margin in margins), len(margins)),
                "" if condition == "none" else gained(own, base, "margins", 1),
                *(share_of(own, field, "replies") for field in ("hits", "opposite")),
            ])  # fmt: skip
        else:
            lines.append([name])
    return table(["", "nats a token", "accuracy, held out", "gain, nats", "sadder replies", "happier"], lines)
