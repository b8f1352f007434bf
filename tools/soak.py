"""make soak: a day in an hour. Cycles of patch, step, save, load and remove, and a bank under changes: nothing grows.

    python -m tools.soak --cycles 20000 --changes 100000 --out bench/results/soak.csv

The engine's soak is tests/serving/test_soak.py, its attacks tests/serving/test_attacks.py (`make serving-test`).
"""

import argparse
import gc
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

import fastedit as fe

from . import table
from .readers import WIDTH, model

IDS = torch.tensor([[3, 7, 11, 2]])
GROWTH = 32 << 20  # bytes that a run may grow between its first fifth and its end


def _resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _logits(llama):
    with torch.no_grad():
        return llama(IDS).logits


def cycles(count):
    """patch, a training step, save, remove, load, remove; each time the model is itself again, bit for bit."""
    llama = model()
    before, names, wrong, start = _logits(llama), list(llama.state_dict()), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            handle = fe.patch(llama, fe.RED(), freeze=True)
            optimiser = torch.optim.SGD(handle.parameters(), lr=0.1)
            llama(IDS, labels=IDS).loss.backward()
            optimiser.step()
            edited = _logits(llama)
            handle.save(folder)
            handle.remove()
            with fe.load(llama, folder):
                wrong += not torch.equal(_logits(llama), edited) or torch.equal(edited, before)
            wrong += not torch.equal(_logits(llama), before) or list(llama.state_dict()) != names
            for parameter in llama.parameters():
                parameter.requires_grad_(True).grad = None
            if number == count // 5:
                start = _resident()
    return wrong, _resident() - start


def changes(count, seed=0):
    """A bank under adds, replacements, removals and assignments at random, few slots, most of it on disk."""
    llama, draw, there, wrong, start = model(), random.Random(seed), {}, 0, 0
    plain = _logits(llama)
    with tempfile.TemporaryDirectory() as folder:
        bank = fe.Bank(llama, capacity=4, rank=0, sites=("mlp",), host=8 * WIDTH * 16, folder=folder)
        expected = {}
        for number in range(count):
            name, kind = f"e{draw.randrange(32)}", draw.random()
            if name not in there:
                there[name] = draw.randrange(8)
                bank.add(name, _steer(there[name]))
            elif kind < 0.1:
                bank.remove(name)
                del there[name]
            elif kind < 0.5:
                there[name] = draw.randrange(8)
                bank.replace(name, _steer(there[name]))
            else:
                with bank.assign([name]):
                    found = _logits(llama)
                known = expected.setdefault(there[name], found)
                wrong += not torch.equal(found, known) or torch.equal(found, plain)
            if number == count // 5:
                start = _resident()
        grown = _resident() - start
        wrong += bank.stats().in_use != 0 or bank.stats().entries != len(there)
        wrong += len(list(Path(folder).iterdir())) > 32
    wrong += len({tuple(f.flatten().tolist()) for f in expected.values()}) != len(expected)
    return wrong, grown


def _steer(number):
    return fe.Steer(torch.randn(WIDTH, generator=torch.Generator().manual_seed(number)), site="mlp")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=20_000)
    parser.add_argument("--changes", type=int, default=100_000)
    parser.add_argument("--out", type=Path, help="a CSV, one row a run")
    asked = parser.parse_args()
    rows = []
    for what, run, count in (("cycles", cycles, asked.cycles), ("bank changes", changes, asked.changes)):
        begun = time.monotonic()
        wrong, grown = run(count)
        rows.append({"run": what, "count": count, "wrong": wrong, "grown_mb": round(grown / 2**20, 1)})
        rows[-1]["wall_s"] = round(time.monotonic() - begun, 1)
        print(rows[-1], flush=True)
    table(rows, asked.out)
    return 1 if any(row["wrong"] or row["grown_mb"] * 2**20 > GROWTH for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
