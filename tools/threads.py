"""make threads: eight threads of forwards beside each operation that docs/reliability.md calls safe.

    python -m tools.threads --forwards 100000 --out bench/results/threads.csv

Every forward is one of the states that the model has had, bit for bit, and the operation's own results are right. The
structure of the model that the threads run on changes between their forwards only: else the change is refused.
"""

import argparse
import itertools
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

import fastedit as fe

from . import table
from .readers import DEPTH, WIDTH, model
from .soak import IDS, _logits, _steer

THREADS = 8


class Crowd:
    """Eight threads of forwards on one patched model with a bank; `wrong` has what was not as it should be."""

    def __init__(self):
        self.model, self.wrong, self.done, self.pause = model(), [], 0, 0.0
        self.handle = fe.patch(self.model, [fe.RED(), fe.Steer(torch.ones(WIDTH), positions="generated")])
        self.bank = fe.Bank(self.model, capacity=THREADS + 2, sites=("mlp",))
        for number in range(THREADS):
            self.bank.add(f"e{number}", _steer(number))
        self.expected = [[] for _ in range(THREADS)]  # of each thread, the states that a forward may be of
        self.learn()

    def learn(self):
        """The present state is one that a forward may be of."""
        for number, states in enumerate(self.expected):
            with self.bank.assign([f"e{number}"]):
                states.append(_logits(self.model))

    def forwards(self, count, operation):
        """`count` forwards in all beside `operation(turn)`, called again and again in this thread; how often it was."""
        self.done, lock, turns = 0, threading.Lock(), 0

        def serve(number):
            draw = random.Random(number)
            try:
                while self.done < count and not self.wrong:
                    with self.bank.assign([f"e{number}"]):
                        found = _logits(self.model)
                    if self.pause:
                        time.sleep(draw.random() * self.pause)
                    if not any(torch.equal(found, state) for state in self.expected[number]):
                        self.wrong.append(f"forward {self.done} of thread {number} is of no state that there was")
                    with lock:
                        self.done += 1
            except BaseException as error:
                self.wrong.append(repr(error))

        threads = [threading.Thread(target=serve, args=(number,)) for number in range(THREADS)]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-4)  # threads take turns often
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
        sys.setswitchinterval(interval)
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
            assert not torch.equal(_logits(crowd.model), crowd.expected[0][0])
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


def dial(crowd, folder):
    """handle.strength of edits at every layer: each layer of a forward has each of them at one of the strengths, wholly.

    Two edits of a layer fold into one.
    """
    vectors = torch.randn(2, DEPTH, WIDTH, generator=torch.Generator().manual_seed(0))
    each = [(kind, vectors[k, n], n) for n in range(DEPTH) for k, kind in enumerate((fe.Ablate, fe.Steer))]
    alone = [fe.patch(crowd.model, kind(vector, site="mlp", layers=[n])) for kind, vector, n in each]
    for strengths in itertools.product(STRENGTHS, repeat=len(alone)):
        for handle, strength in zip(alone, strengths, strict=True):
            handle.strength = strength
        crowd.learn()
    for handle in alone:
        handle.remove()
    handle = fe.patch(crowd.model, [fe.Ablate(vectors[0][:, None], site="mlp"), fe.Steer(vectors[1], site="mlp")])

    def operation(turn):
        handle.strength = STRENGTHS[turn % len(STRENGTHS)]

    return operation


def saving(crowd, folder):
    def operation(turn):
        crowd.handle.save(folder)
        if turn == 0:
            with fe.load(model(), folder) as loaded:
                own = crowd.handle.named_tensors()
                assert all(torch.equal(tensor, own[name]) for name, tensor in loaded.named_tensors().items())

    return operation


def changing(crowd, folder):
    """patch, load_tensors, merge, unmerge, remove, load on the model itself: refused, or wholly between two forwards."""
    edit, crowd.pause = fe.Steer(torch.ones(WIDTH), site="attn", layers=[0]), PAUSE
    with fe.patch(crowd.model, edit) as handle:
        handle.save(folder)
        crowd.learn()
        tensors = {name: 2 * tensor for name, tensor in handle.named_tensors().items()}
        handle.load_tensors(tensors)
        crowd.learn()
        handle.merge()
        crowd.learn()
        handle.unmerge()
    made, refused = dict.fromkeys(("patch", "load_tensors", "merge", "unmerge", "remove", "load", "removed"), 0), []

    def attempt(name, change):
        while not crowd.wrong:
            try:
                found = change()
            except RuntimeError as error:
                if "a forward is under way in the thread" not in str(error):
                    raise
                refused.append(name)
                time.sleep(0.001)
            else:
                made[name] += 1
                return found

    def operation(turn):
        handle = attempt("patch", lambda: fe.patch(crowd.model, edit))
        for name, change in (
            ("load_tensors", lambda: handle.load_tensors(tensors)), ("merge", lambda: handle.merge()),
            ("unmerge", lambda: handle.unmerge()), ("remove", lambda: handle.remove()),
        ):  # fmt: skip
            attempt(name, change)
        handle = attempt("load", lambda: fe.load(crowd.model, folder))
        attempt("removed", lambda: handle.remove())

    operation.made, operation.refused = made, refused
    return operation


STRENGTHS, PAUSE = (1.0, 0.0, -0.5), 0.05
OPERATIONS = {
    "generate": generate, "a bank changes": change, "eviction": evict, "training": train, "slots": slots, "dial": dial,
    "saving": saving, "changes of the model": changing,
}  # fmt: skip


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
