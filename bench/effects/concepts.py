"""AxBench's concept detection (arXiv 2501.17148) on the chat model: which direction says that a text holds a concept?

Fixed before the first run:
    texts      ten concepts. For each, the first 36 texts that hold it train, beside the same 72 that hold none (24 each of
               text, math and code); all 36 that hold it and the 36 without it that the evaluation names for this concept are
               judged, and in a second figure its hard negatives, which use its words for something else
    reading    user turn and answer through the chat template, the first 40 tokens of the answer; states after 11 and after 16
               of the 30 blocks. The published setting reads whole answers, with Gemma-2-2B
    methods    a direction w from the answers' tokens: difference of means; first principal component of the tokens that hold
               the concept, its sign by the texts trained on; logistic regression on standardized tokens
    trained    detectors.py, after 16 blocks: ReFT-r1, a direction as well, and RED, which scores a text by itself
    controls   random directions, and differences of means with the labels of the texts dealt at random; seeds 0, 1, 2
    score      the largest h·w of a text's tokens; AUROC for each concept; Student's 95 % interval over the ten
"""

import json
from dataclasses import dataclass

import torch

from fastedit.capturing.truncated_forward import residual_stream
from fastedit.directions.contrast import _logistic
from fastedit.patching.eval_mode import evaluating
from fastedit.texts.chat import encode
from fastedit.training.batches import Padded, as_features

from .detectors import red_gain, reft_r1
from .onchat import Loaded, table
from .rows import Rows
from .statistics import auroc, over_seeds

CONCEPTS, TRAIN, NEGATIVES, BLOCKS, TOKENS, SEEDS, BATCH = 10, 36, 24, (11, 16), 40, (0, 1, 2), 16
METHODS = {
    "means": "difference of means", "pca": "principal component", "logistic": "logistic probe", "reft-r1": "ReFT-r1",
    "red": "RED, gain of log p", "random": "random direction", "shuffled": "shuffled labels",
}  # fmt: skip
KEYS, FIELDS = ("method", "blocks", "seed"), ("auroc", "hard", "concepts")


TRAINED = ("reft-r1", "red")  # half an hour each on an idle core: after the last of BLOCKS alone


def plan():
    return [
        (method, blocks, seed)
        for trained in (False, True)
        for blocks in (BLOCKS[-1:] if trained else BLOCKS)
        for method in METHODS
        if (method in TRAINED) is trained
        for seed in (SEEDS if method in ("random", "shuffled") else (0,))
    ]


def run(data, out, given=None, first=False):
    """One pass over the texts serves every row that is missing, also with `first`."""
    rows, loaded = Rows(out / "effects-concepts.csv", KEYS, FIELDS), Loaded(given)
    missing = [cell for cell in plan() if not rows.has(**dict(zip(KEYS, cell, strict=True)))]
    if not missing:
        return
    train, judged = texts(data)
    model, tokenizer = loaded()
    features = encoded(tokenizer, [*train, *judged])
    states = read(model, features)
    for method, blocks, seed in missing:
        own = [token_states[BLOCKS.index(blocks)] for token_states in states]
        fit = Trained(model, features, blocks, seed)
        found = [measured(train, judged, own, concept, method, seed, fit) for concept in range(CONCEPTS)]
        plain, hard = ([round(value[n], 4) for value in found if value[n] is not None] for n in (0, 1))
        rows.add(
            {"method": method, "blocks": blocks, "seed": seed, "auroc": json.dumps(plain), "hard": json.dumps(hard),
             "concepts": len(plain)}
        )  # fmt: skip


def texts(data):
    """(texts to train on, texts to judge): rows of AxBench's files."""
    train, judged = (
        [json.loads(line) for line in (data / "data" / "axbench" / f"concept10_{name}.jsonl").read_text().splitlines()]
        for name in ("train", "eval")
    )
    counts, kept = {}, []
    for row in train:
        kind = row["concept_id"] if row["category"] == "positive" else row["concept_genre"]
        counts[kind] = counts.get(kind, 0) + 1
        if counts[kind] <= (TRAIN if row["category"] == "positive" else NEGATIVES):
            kept.append(row)
    return kept, judged


def encoded(tokenizer, rows):
    """Features of each text: the user's turn and the first tokens of its answer."""
    return [
        as_features(encode(tokenizer, [{"role": "user", "content": row["input"]}], row["output"]).cut(None, TOKENS))
        for row in rows
    ]


@torch.no_grad()
def read(model, features):
    """For each text a list over BLOCKS of (tokens, width): the states of its answer's first tokens."""
    order, found = sorted(range(len(features)), key=lambda n: len(features[n]["ids"])), [None] * len(features)
    with evaluating(model):
        for start in range(0, len(order), BATCH):
            some = order[start : start + BATCH]
            batch = Padded(0)([features[n] for n in some])
            labels = batch.pop("labels")
            place = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
            streams = residual_stream(model, BLOCKS, {**batch, "position_ids": place})
            for row, n in enumerate(some):
                found[n] = [stream[row][labels[row] != -100].clone() for stream in streams]
    return found


@dataclass
class Trained:
    """What the two trained methods need: the model, the features of all texts in the states' order, the block, the seed."""

    model: torch.nn.Module
    features: list
    blocks: int
    seed: int


def measured(train, judged, states, concept, method, seed, fit=None):
    """(AUROC against texts without the concept, against hard negatives or None) of a concept."""
    positive = [n for n, row in enumerate(train) if row["concept_id"] == concept]
    negative = [n for n, row in enumerate(train) if row["category"] != "positive"]
    asked = [n for n, row in enumerate(judged) if row["concept_id"] == concept]
    if method == "red":
        some = ([fit.features[n] for n in positive], [fit.features[len(train) + n] for n in asked])
        values = red_gain(fit.model, *some, fit.blocks, seed)
    else:
        if method == "reft-r1":
            w = reft_r1(fit.model, *([fit.features[n] for n in side] for side in (positive, negative)), fit.blocks, seed)
        else:
            w = direction(*([states[n] for n in side] for side in (positive, negative)), method, seed)
        values = torch.stack([(states[len(train) + n].double() @ w).max() for n in asked])
    kinds = [judged[n]["category"] for n in asked]
    of = {kind: values[torch.tensor([k == kind for k in kinds])] for kind in ("positive", "negative", "hard negative")}
    hard = auroc(of["positive"], of["hard negative"]) if len(of["hard negative"]) else None
    return auroc(of["positive"], of["negative"]), hard


def direction(positive, negative, method, seed):
    """w (width,) float64 from the token states of texts."""
    draw = torch.Generator().manual_seed(seed)
    if method == "random":
        return torch.randn(positive[0].shape[1], generator=draw).double()
    if method == "shuffled":
        both = [*positive, *negative]
        order = torch.randperm(len(both), generator=draw).tolist()
        positive, negative = [both[n] for n in order[: len(positive)]], [both[n] for n in order[len(positive) :]]
    sets = torch.cat(positive).double(), torch.cat(negative).double()
    if method == "logistic":
        return _logistic(*sets, seed)[0]
    if method == "pca":
        apart = sets[0] - sets[0].mean(0)
        w = torch.linalg.eigh(apart.T @ apart).eigenvectors[:, -1]
        says = auroc(*(torch.stack([(s.double() @ w).max() for s in some]) for some in (positive, negative)))
        return w if says >= 0.5 else -w
    return sets[0].mean(0) - sets[1].mean(0)


# --- the page ---------------------------------------------------------------------------------------------------------


def markdown(path):
    rows = Rows(path, KEYS, FIELDS).read()
    columns = [(blocks, name) for blocks in BLOCKS for name in ("auroc", "hard")]
    heads = [f"after {blocks} blocks{', hard negatives' if name == 'hard' else ''}" for blocks, name in columns]
    lines = []
    for method, name in METHODS.items():
        lines.append([name])
        for blocks, field in columns:
            found = [json.loads(r[field]) for r in rows if (r["method"], r["blocks"]) == (method, str(blocks))]
            each = [sum(some) / len(some) for some in zip(*found, strict=True)]
            lines[-1].append(_shown(each) if each else "not run")
    return table(["", *heads], lines)


def _shown(each):
    middle, half = sum(each) / len(each), over_seeds(each)
    return f"{middle:.2f} ({max(0, middle - half):.2f}–{min(1, middle + half):.2f})"
