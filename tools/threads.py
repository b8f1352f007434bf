"""make soak, its threads: eight threads of forwards beside each operation that docs/reliability.md calls safe.

    python -m tools.threads --forwards 100000 --out bench/results/threads.csv

Every forward is one of the states that the model has had, bit for bit, and the operation's own results are right.
"""

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

import fastedit as fe

from . import table
from .readers import WIDTH, model
from .soak import IDS, _logits, _steer

THREADS = 8


class Crowd:
    """Eight threads of forwards on one patched model with a bank; `wrong` has what was not as it should be."""

    def __init__(self):
        self.model, self.wrong, self.done = model(), [], 0
        self.handle = fe.patch(self.model, [fe.RED(), fe.Steer(torch.ones(WIDTH), positions="generated")])
        self.bank = fe.Bank(self.model, capacity=THREADS + 2, sites=("mlp",))
        for number in range(THREADS):
            self.bank.add(f"e{number}", _steer(number))
        self.expected = []
        for number in range(THREADS):
            with self.bank.assign([f"e{number}"]):
                self.expected.append(_logits(self.model))

    def forwards(self, count, operation):
        """`count` forwards in all beside `operation(turn)`, called again and again in this thread; how often it was."""
        self.done, lock, turns = 0, threading.Lock(), 0

        def serve(number):
            try:
                while self.done < count and not self.wrong:
                    with self.bank.assign([f"e{number}"]):
                        same = torch.equal(_logits(self.model), self.expected[number])
                    if not same:
                        self.wrong.append(f"forward {self.done} of thread {number} is of no state that there was")
                    with lock:
                        self.done += 1
            except BaseException as error:
                self.wrong.append(repr(error))

        threads = [threading.Thread(target=serve, args=(number,)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        try:
            while self.done < count and not self.wrong:
                operation(turns)
                turns += 1
        except BaseException as error:
            self.wrong.append(f"the operation: {error!r}")
        for thread in threads:
            thread.join()
        return turns

    def close(self):
        self.bank.close()
        self.handle.remove()


def generate(crowd, folder):
    with crowd.bank.assign([None]):
        first = crowd.model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)

    def operation(turn):
        with crowd.bank.assign([None]):
            assert torch.equal(crowd.model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0), first)

    return operation


def change(crowd, folder):
    """add, replace, assign, remove."""

    def operation(turn):
        crowd.bank.add("new", _steer(20 + turn % 5))
        crowd.bank.replace("new", _steer(30 + turn % 5))
        with crowd.bank.assign(["new"]):
            assert not torch.equal(_logits(crowd.model), crowd.expected[0])
        crowd.bank.remove("new")

    return operation


def evict(crowd, folder):
    """More names than slots: each is brought in in place of another."""
    names = [f"more {number}" for number in range(4)]
    for number, name in enumerate(names):
        if name not in crowd.bank:
            crowd.bank.add(name, _steer(40 + number))

    def operation(turn):
        crowd.bank.prefetch([names[turn % 4]])

    return operation


def train(crowd, folder):
    """Another model of the same classes: patched, a step, saved, loaded, merged, removed."""
    other = model()
    before = _logits(other)

    def operation(turn):
        with fe.patch(other, fe.RED()) as handle:
            optimiser = torch.optim.SGD(handle.parameters(), lr=0.1)
            other(IDS, labels=IDS).loss.backward()
            optimiser.step()
            handle.save(folder)
        with fe.load(other, folder) as handle:
            handle.strength = 0.5
            edited = _logits(other)
            handle.merge()
            assert torch.allclose(_logits(other), edited, atol=1e-4)
        assert torch.equal(_logits(other), before)

    return operation


def slots(crowd, folder):
    """Training over slots of two numbers of rows, whose order belongs to a call."""

    def operation(turn):
        rows = 5 + turn % 7
        scale = torch.ones(3, WIDTH, requires_grad=True)
        slot = (torch.arange(rows) % 4 - 1).int()
        fe.ops.edit(torch.ones(rows, WIDTH), scale, slot=slot).sum().backward()
        assert torch.equal(scale.grad[:, 0], torch.bincount(slot[slot >= 0].long(), minlength=3).float())

    return operation


OPERATIONS = {"generate": generate, "a bank changes": change, "eviction": evict, "training": train, "slots": slots}


def beside(name, count):
    """(forwards, turns of the operation, what was wrong)."""
    with tempfile.TemporaryDirectory() as folder:
        crowd = Crowd()
        try:
            turns = crowd.forwards(count, OPERATIONS[name](crowd, folder))
        finally:
            crowd.close()
    return crowd.done, turns, crowd.wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forwards", type=int, default=100_000, help="beside each operation")
    parser.add_argument("--out", type=Path, help="a CSV, one row an operation")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in OPERATIONS:
        begun = time.monotonic()
        done, turns, wrong = beside(name, asked.forwards)
        rows.append({"beside": name, "threads": THREADS, "forwards": done, "operations": turns, "wrong": len(wrong)})
        rows[-1]["wall_s"] = round(time.monotonic() - begun, 1)
        print(rows[-1], *wrong[:3], sep="\n  ", flush=True)
    table(rows, asked.out)
    return 1 if any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
