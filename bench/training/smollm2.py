"""How far RED, RED+, LoReFT and LoRA lower the held-out loss of SmolLM2-135M-Instruct in the same SFT steps.

    python -m bench.training.smollm2 --out bench/results/sft_smollm2.csv

The task: what does a function of Python's standard library do? The answer is the first line of its docstring. Rows, order and
seed are fixed; each method runs at each rate of its grid, with the same steps; a run's row is written as it ends, and runs that
are in the file are not repeated. `gain` is the held-out loss before minus after, in nats a token of the response.
"""

import argparse
import ast
import csv
import hashlib
import json
import sysconfig
import time
from pathlib import Path

MODULES = (
    "argparse", "ast", "base64", "bisect", "calendar", "codecs", "collections", "contextlib", "copy", "csv", "datetime",
    "difflib", "dis", "email", "fractions", "ftplib", "functools", "glob", "gzip", "heapq", "html", "imaplib", "inspect",
    "ipaddress", "json", "logging", "mailbox", "mimetypes", "ntpath",
    "os", "pathlib", "pickle", "platform", "posixpath", "pprint", "random",
    "re", "shelve", "shlex", "shutil", "smtplib", "socket", "statistics", "string", "subprocess", "tarfile", "tempfile",
    "textwrap", "threading", "timeit", "tokenize", "traceback", "types", "typing", "unittest", "urllib", "uuid", "weakref",
    "zipfile",
)  # fmt: skip
GRID = (
    ("red", 5e-3), ("lora", 2e-4), ("red", 2e-2), ("lora", 1e-3), ("red+", 5e-3), ("loreft", 2e-3), ("lora", 5e-3),
    ("red", 6e-2), ("red+", 2e-2), ("loreft", 1e-2),
)  # fmt: skip
STEPS, BATCH, HELD_OUT, TOKENS = 32, 8, 48, 40
FIELDS = ("method", "rate", "parameters", "steps", "before", "after", "gain", "seconds", "rows", "held_out", "losses")


def rows():
    """Questions and first lines of docstrings, in the order of a hash."""
    root, found = Path(sysconfig.get_path("stdlib")), {}
    for module in MODULES:
        path = root / f"{module}.py" if (root / f"{module}.py").is_file() else root / module / "__init__.py"
        for node in ast.walk(ast.parse(path.read_bytes())):
            if (
                isinstance(node, ast.FunctionDef)
                and not node.name.startswith("_")
                and (said := ast.get_docstring(node))
            ):
                line = said.split("\n")[0].strip()
                if 4 <= len(line.split()) <= 20:
                    found[f"{module}.{node.name}"] = line
    ordered = sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest())
    system = {"role": "system", "content": "Answer in one line."}
    return [
        {"prompt": [system, {"role": "user", "content": f"What does {name} do in Python?"}], "response": found[name]}
        for name in ordered
    ]


def losses(model, features):
    """Of each held-out row: (sum of −log p, tokens)."""
    import torch

    from fastedit.training.batches import Padded, token_logps

    found = []
    with torch.no_grad():
        for start in range(0, len(features), BATCH):
            said, mask = token_logps(model, model, Padded(0)(features[start : start + BATCH]))
            found += zip((-said).sum(1).tolist(), mask.sum(1).tolist(), strict=True)
    return found


def mean(found):
    return sum(loss for loss, _ in found) / sum(count for _, count in found)


def run(model, tokenizer, method, rate, data, held):
    """(the losses after, parameters trained, seconds)"""
    import torch

    import fastedit as fe
    from fastedit import training

    wrapped = None
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        handle = fe.patch(model, fe.Steer(torch.zeros(model.config.hidden_size), layers=0))
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        wrapped = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets))
    else:
        edits = {"red": fe.RED, "red+": fe.REDPlus, "loreft": lambda: fe.LoReFT(4)}[method]()
        handle = fe.patch(model, edits, freeze=True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    began = time.perf_counter()
    training.sft(handle, tokenizer, data, lr=rate, epochs=1, batch_size=BATCH, max_steps=STEPS, response=TOKENS)
    seconds = time.perf_counter() - began
    model.eval()
    after = losses(model, held)
    if wrapped is not None:
        wrapped.unload()
    handle.remove()
    return after, trained, seconds


def markdown(path, draws=2000):
    """A line for each method, at the rate of its grid that gained most; 95 % intervals by drawing held-out rows anew, the same
    ones for all methods.
    """
    import torch

    with open(path, encoding="utf-8", newline="") as file:
        runs = list(csv.DictReader(file))
    best = {}
    for row in runs:
        if row["method"] not in best or float(row["gain"]) > float(best[row["method"]]["gain"]):
            best[row["method"]] = row
    kept = {name: torch.tensor(json.loads(row["losses"]), dtype=torch.float64) for name, row in best.items()}
    count = len(next(iter(kept.values())))
    drawn = torch.randint(count, (draws, count), generator=torch.Generator().manual_seed(0))
    gains = {n: (t[drawn, 0] - t[drawn, 1]).sum(1) / t[drawn, 2].sum(1) for n, t in kept.items()}
    lines = ["| | parameters | rates tried | best rate | gain, nats a token | of LoRA's |", "|---|---|---|---|---|---|"]
    for name, row in best.items():
        low, high = gains[name].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        share = ""
        if "lora" in best and name != "lora":
            ends = (gains[name] / gains["lora"]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
            share = f"{float(row['gain']) / float(best['lora']['gain']):.2f} ({ends[0]:.2f}–{ends[1]:.2f})"
        tried = sum(other["method"] == name for other in runs)
        lines.append(
            f"| {name} | {int(row['parameters']):,} | {tried} | {float(row['rate']):g} | {float(row['gain']):.3f} "
            f"({low:.3f}–{high:.3f}) | {share} |"
        )
    return "\n".join(lines)


def main():
    import torch

    import fastedit as fe
    from fastedit.training.responses import encode

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results/sft_smollm2.csv"))
    parser.add_argument("--table", action="store_true", help="train nothing: the table of the file's rows")
    args = parser.parse_args()
    if args.table:
        return print(markdown(args.out))
    data = rows()
    held_rows, data = data[:HELD_OUT], data[HELD_OUT : HELD_OUT + STEPS * BATCH]
    model, tokenizer = fe.chat_model()
    held = encode(tokenizer, held_rows, response=TOKENS)
    done = set()
    if args.out.is_file():
        with open(args.out, encoding="utf-8", newline="") as file:
            done = {(row["method"], float(row["rate"])) for row in csv.DictReader(file)}
    else:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with open(args.out, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerow(FIELDS)
    before = losses(model, held)
    for method, rate in GRID:
        if (method, rate) in done:
            continue
        after, trained, seconds = run(model, tokenizer, method, rate, data, held)
        gained = mean(before) - mean(after)
        each = json.dumps([[round(b[0], 4), round(a[0], 4), a[1]] for b, a in zip(before, after, strict=True)])
        line = (method, rate, trained, STEPS, *(round(v, 5) for v in (mean(before), mean(after), gained)), round(seconds, 1))
        with open(args.out, "a", encoding="utf-8", newline="") as file:
            csv.writer(file).writerow((*line, len(data), len(held), each))
        print(
            method,
            rate,
            f"{trained:,} parameters, gain {gained:.4f}, {seconds:.0f} s, torch {torch.__version__}",
            flush=True,
        )


if __name__ == "__main__":
    main()
