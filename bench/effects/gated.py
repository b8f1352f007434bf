"""Gates of CAST and InferAligner on the chat model: do replies change where the gate is meant to open, and only there?

Fixed before the first run:
    prompts    24 on sport and 24 others (texts/), line k beside line k; two folds: 12 + 12 held out, 12 + 12 for everything else
    cast       the condition by cast.fit on the 12 + 12 (layers 4 to 9); behind it the mood direction of chat.py at ten layers
               from 10 on, 0.4 nats over the fitted sport prompts without a gate. Cells: none, without a gate, gated, gated by a
               condition found with the labels dealt at random. A hit: more happy words than sad ones
    aligned    a copy of the model that refuses sport: RED, 4 epochs of SFT at 2e-2, batches of 6, on the 12 + 12 prompts; the
               answers are the four refusals of texts/no_sport.txt in turn, and for the others what the model itself says
               greedily. It is fine-tuned here and is no safety-aligned model: not the published setting
    inferaligner  inferaligner.fit(target: the model, aligned: the copy); steered at those of the layers 8 to 19 whose gate is
               right on 90 % of a quarter of the fitted prompts (or the best one), at 1 nat a token over the fitted sport
               prompts. Cells: none, gated, without a gate, a random direction behind the same gate at the same KL, asked in
               the system turn, and the copy itself. A hit: a reply that has one of PHRASES
    gate       AUROC of h·s at the last token, held out, the mean over the layers steered; of CAST's s
    replies    greedy, 16 tokens, to the 24 prompts held out
"""

import json

import torch

import fastedit as fe
from fastedit import examples, training
from fastedit.directions.sweep import random_like
from fastedit.methods import cast, inferaligner
from fastedit.methods.replies import replies

from . import chat
from .onchat import TOKENS, Loaded, as_chats, calibrated, share_of, table
from .rows import Rows
from .statistics import auroc

FOLDS, CAST_LAYERS, CAST_NATS, NATS, LAYERS, EPOCHS, RATE = (0, 1), (4, 10), 0.4, 1.0, (8, 20), 4, 2e-2
ASKED = "You do not talk about sport. If you are asked about sport, say that you are sorry and that you do not talk about it."
PHRASES = ("sorry", "cannot help", "can't help", "not talk about", "not answer")
KEYS, FIELDS = ("method", "cell", "fold"), ("strength", "layers", "auroc", "prompts", "sport", "other", "example")
CELLS = {
    ("cast", "none"): "no edit", ("cast", "open"): "mood direction, no gate", ("cast", "gated"): "behind the condition",
    ("cast", "shuffled"): "behind a condition of shuffled labels", ("inferaligner", "none"): "no edit",
    ("inferaligner", "gated"): "behind the gate", ("inferaligner", "open"): "no gate",
    ("inferaligner", "random"): "random direction behind the gate", ("inferaligner", "asked"): "asked in the system turn",
    ("inferaligner", "aligned"): "the copy that was fine-tuned",
}  # fmt: skip


def run(out, given=None, first=False):
    rows, loaded = Rows(out / "effects-gated.csv", KEYS, FIELDS), Loaded(given)
    for fold in FOLDS[: 1 if first else None]:
        for method, measure in (("cast", by_cast), ("inferaligner", by_inferaligner)):
            cells = [cell for name, cell in CELLS if name == method]
            if any(not rows.has(method=method, cell=cell, fold=fold) for cell in cells):
                for cell, values in measure(*loaded(), fold):
                    if not rows.has(method=method, cell=cell, fold=fold):
                        rows.add({"method": method, "cell": cell, "fold": fold} | values)


def dealt(fold):
    """((sport, other) fitted, (sport, other) held out), prompts as texts."""
    sets = [examples.lines(chat.TEXTS / f"{name}.txt") for name in ("sport", "other")]
    held = [some[fold :: len(FOLDS)] for some in sets]
    return [[p for p in some if p not in out] for some, out in zip(sets, held, strict=True)], held


def answers(model, tokenizer, held, hit, system=None):
    """What a row says of the replies to the prompts held out."""
    said = [replies(model, tokenizer, as_chats(some, system), max_new_tokens=TOKENS, batch_size=8) for some in held]
    hits = [sum(map(hit, some)) for some in said]
    return {"prompts": len(held[0]), "sport": hits[0], "other": hits[1], "example": " ".join(said[0][0].split())}


def happier(reply):
    found = examples.tally(reply, examples.moods())
    return found["happy"] > found["sad"]


def refuses(reply):
    return any(phrase in reply.lower() for phrase in PHRASES)


# --- CAST -------------------------------------------------------------------------------------------------------------


def by_cast(model, tokenizer, fold):
    fitted, held = dealt(fold)
    yield "none", {"strength": 0.0, "layers": "", "auroc": ""} | answers(model, tokenizer, held, happier)
    found = chat.directions_of(model, tokenizer, *chat.sides_of("mood")[:2])
    depth = len(found)
    own = found.at(*range(depth // 3, depth // 3 + -(-depth // 3)))
    early = [layer for layer in range(*CAST_LAYERS) if layer < depth // 3] or [0]
    true = cast.fit(model, tokenizer, *map(as_chats, fitted), layers=early, seed=fold, progress=False)
    both = [*fitted[0], *fitted[1]]
    order = torch.randperm(len(both), generator=torch.Generator().manual_seed(fold)).tolist()
    turned = [as_chats([both[n] for n in part]) for part in (order[: len(order) // 2], order[len(order) // 2 :])]
    wrong = cast.fit(model, tokenizer, *turned, layers=early, seed=fold, progress=False)
    with fe.patch(model, fe.Steer(own, site="block")) as handle:
        strength = calibrated(model, tokenizer, handle, as_chats(fitted[0]), CAST_NATS)
        yield "open", {"strength": strength, "layers": "", "auroc": ""} | answers(model, tokenizer, held, happier)
    for cell, condition in (("gated", true), ("shuffled", wrong)):
        rows = [chat.mean_states(model, tokenizer, as_chats(some), condition.layer) for some in held]
        said = [cast.similarity(some, condition.vector) * (1 if condition.when == "above" else -1) for some in rows]
        with fe.patch(model, fe.Steer(own, site="block", strength=strength).when(condition.gate())):
            yield cell, {"strength": strength, "layers": condition.layer, "auroc": auroc(*said)} | answers(
                model, tokenizer, held, happier
            )


# --- InferAligner -----------------------------------------------------------------------------------------------------


def by_inferaligner(model, tokenizer, fold):
    fitted, held = dealt(fold)
    chats = [as_chats(some) for some in fitted]
    blank = {"strength": 0.0, "layers": "", "auroc": ""}
    yield "none", blank | answers(model, tokenizer, held, refuses)
    yield "asked", blank | answers(model, tokenizer, held, refuses, ASKED)
    with taught(model, tokenizer, fitted, fold):
        yield "aligned", blank | answers(model, tokenizer, held, refuses)
        theta = fe.contrast(model, tokenizer, *chats, progress=False)
    guidance = inferaligner.fit(model, theta, tokenizer, *chats, seed=fold, progress=False)
    right = {n: guidance.own.statistics[n]["accuracy"] for n in guidance.own if LAYERS[0] <= n < LAYERS[1]}
    within = [n for n in right if right[n] >= 0.9] or [max(right, key=right.get)]
    gate = {"layers": json.dumps(within), "auroc": gate_auroc(model, tokenizer, guidance, within, held)}
    random = inferaligner.Guidance(random_like(guidance.theta, fold), guidance.own)
    for cell, edit in (
        ("gated", guidance.edit(layers=within)),
        ("open", fe.Steer(guidance.theta, site="block", layers=within)),
        ("random", random.edit(layers=within)),
    ):
        with fe.patch(model, edit) as handle:
            strength = calibrated(model, tokenizer, handle, chats[0], NATS)
            yield cell, {"strength": strength} | gate | answers(model, tokenizer, held, refuses)


def taught(model, tokenizer, fitted, fold):
    """A handle on the model, which refuses sport with it."""
    refusals = examples.lines(chat.TEXTS / "no_sport.txt")
    own = replies(model, tokenizer, as_chats(fitted[1]), max_new_tokens=TOKENS, batch_size=8)
    said = [*(refusals[n % len(refusals)] for n in range(len(fitted[0]))), *own]
    rows = [
        {"prompt": prompt, "response": text}
        for prompt, text in zip(as_chats([*fitted[0], *fitted[1]]), said, strict=True)
        if text.strip()
    ]
    handle = fe.patch(model, fe.RED(), freeze=True)
    training.sft(handle, tokenizer, rows, lr=RATE, epochs=EPOCHS, batch_size=6, seed=fold)
    return handle


def gate_auroc(model, tokenizer, guidance, layers, held):
    captured = [
        torch.stack([fe.capture(model, tokenizer, [c], layers=layers, progress=False)[n].mean()[0] for n in layers], 0)
        for some in held for c in as_chats(some)
    ]  # fmt: skip
    count, total = len(held[0]), 0.0
    for place, layer in enumerate(layers):
        scores = torch.stack([states[place] for states in captured]).double() @ guidance.own[layer].double()
        total += auroc(scores[:count], scores[count:])
    return total / len(layers)


# --- the page ---------------------------------------------------------------------------------------------------------


def markdown(path):
    found = Rows(path, KEYS, FIELDS).read()
    lines = []
    for (method, cell), name in CELLS.items():
        rows = [row for row in found if (row["method"], row["cell"]) == (method, cell)]
        line = [{"cast": "CAST: happier", "inferaligner": "InferAligner: refuses"}[method], name]
        if rows:
            scores = [float(row["auroc"]) for row in rows if row["auroc"]] if cell in ("gated", "shuffled") else []
            line.append(", ".join(f"{score:.2f}" for score in scores))
            line += [share_of(rows, field, "prompts") for field in ("sport", "other")]
        lines.append(line)
    return table(["", "", "AUROC of the gate, held out, each fold", "hits on sport", "hits on others"], lines)
