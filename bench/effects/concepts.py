"""AxBench's concept detection (arXiv 2501.17148) on the chat model: which direction says that a text holds a concept?

Fixed before the first run:
    texts      ten concepts. For each, the first 36 texts that hold it train, beside the same 72 that hold none (24 each of
               text, math and code); all 36 that hold it and the 36 without it that the evaluation names for this concept are
               judged, and in a second figure its hard negatives, which use its words for something else
    reading    user turn and answer through the chat template, the first 40 tokens of the answer; states after 11 and after 16
               of the 30 blocks. The published setting reads whole answers, with Gemma-2-2B
    methods    a direction w from the answers' tokens: difference of means; first principal component of the tokens that hold
               the concept, its sign by the texts trained on; logistic regression on standardized tokens
    controls   random directions, and differences of means with the labels of the texts dealt at random; seeds 0, 1, 2
    score      the largest h·w of a text's tokens; AUROC for each concept; Student's 95 % interval over the ten
Not in the plan: ReFT-r1, which the library does not have, and RED, whose scales and biases give no score to a text.
"""

import json

import torch

from fastedit.capturing.truncated_forward import residual_stream
from fastedit.directions.contrast import _logistic
from fastedit.patching.eval_mode import evaluating
from fastedit.texts.chat import encode
from fastedit.training.batches import Padded, as_features

from .onchat import Loaded, table
from .rows import Rows
from .statistics import auroc, over_seeds

CONCEPTS, TRAIN, NEGATIVES, BLOCKS, TOKENS, SEEDS, BATCH = 10, 36, 24, (11, 16), 40, (0, 1, 2), 16
METHODS = {
    "means": "difference of means", "pca": "principal component", "logistic": "logistic probe", "random": "random direction",
    "shuffled": "shuffled labels",
}  # fmt: skip
KEYS, FIELDS = ("method", "blocks", "seed"), ("auroc", "hard", "concepts")


def plan():
    return [
        (method, blocks, seed)
        for blocks in BLOCKS
        for method in METHODS
        for seed in (SEEDS if method in ("random", "shuffled") else (0,))
    ]


def run(data, out, given=None, first=False):
    """One pass over the texts serves every row that is missing, also with `first`."""
    rows, loaded = Rows(out / "effects-concepts.csv", KEYS, FIELDS), Loaded(given)
    missing = [cell for cell in plan() if not rows.has(**dict(zip(KEYS, cell, strict=True)))]
    if not missing:
        return
    train, judged = texts(data)
    states = read(*loaded(), [*train, *judged])
    for method, blocks, seed in missing:
        own = [token_states[BLOCKS.index(blocks)] for token_states in states]
        found = [measured(train, judged, own, concept, method, seed) for concept in range(CONCEPTS)]
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


@torch.no_grad()
def read(model, tokenizer, rows):
    """For each text a list over BLOCKS of (tokens, width): the states of its answer's first tokens."""
    features = [
        as_features(encode(tokenizer, [{"role": "user", "content": row["input"]}], row["output"]).cut(None, TOKENS))
        for row in rows
    ]
    order, found = sorted(range(len(rows)), key=lambda n: len(features[n]["ids"])), [None] * len(rows)
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


def measured(train, judged, states, concept, method, seed):
    """(AUROC against texts without the concept, against hard negatives or None) of a concept."""
    positive = [s for row, s in zip(train, states, strict=False) if row["concept_id"] == concept]
    negative = [s for row, s in zip(train, states, strict=False) if row["category"] != "positive"]
    w = direction(positive, negative, method, seed)
    scores = {"positive": [], "negative": [], "hard negative": []}
    for row, s in zip(judged, states[len(train) :], strict=True):
        if row["concept_id"] == concept:
            scores[row["category"]].append((s.double() @ w).max())
    scores = {name: torch.stack(some) if some else None for name, some in scores.items()}
    hard = scores["hard negative"]
    return auroc(scores["positive"], scores["negative"]), None if hard is None else auroc(scores["positive"], hard)


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
