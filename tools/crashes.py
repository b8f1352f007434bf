"""make crashes: writers of every kind are killed at a random moment; what is there afterwards is the old or the new, whole.

    python -m tools.crashes --kills 10000 --out bench/results/crashes.csv
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

import fastedit as fe
from fastedit.capturing.rows_on_disk import Rows, RowWriter
from fastedit.files import edit_file
from fastedit.methods.trajectories import Trajectories

from . import table

JOB = {"rank": 0, "processes": 1, "layers": [1], "names": ["0"]}


def _edit(folder, value):
    tensors = {f"0.layers.{layer}.mlp.{name}": torch.full((4096,), value) for layer in range(2) for name in ("scale", "bias")}
    edit_file.write(folder, {"edits": [], "training": {"value": value}}, tensors)


def _edit_of(folder):
    header, tensors = edit_file.read(folder)
    return {header["training"]["value"], *(t.unique().item() for t in tensors.values())}


def _directions(folder, value):
    fe.Directions({1: torch.full((8192,), value)}, {1: {"norm": value}}, {"value": value}).save(folder)


def _directions_of(folder):
    found = fe.Directions.load(folder)
    return {found.about["value"], found.statistics[1]["norm"], *found[1].unique().tolist()}


def _rows(folder, value):
    writer = RowWriter(folder, JOB, fresh=False)
    writer.add(1, torch.full((512, 16), value), torch.zeros(512, dtype=torch.int64), torch.arange(512))
    writer.flush(512)


def _rows_of(folder):
    return set(Rows(folder).layer(1)[0].unique().tolist())


def _trajectories(folder, value):
    path = folder / "trajectories.safetensors"
    Trajectories(torch.full((512, 16), value), torch.tensor([512]), torch.tensor([value]), [str(value)], ["x"]).save(path)


def _trajectories_of(folder):
    found = Trajectories.load(folder / "trajectories.safetensors")
    return {float(found.prompts[0]), found.rewards.item(), *found.states.unique().tolist()}


KINDS = {
    "edit": (_edit, _edit_of), "directions": (_directions, _directions_of), "rows": (_rows, _rows_of),
    "trajectories": (_trajectories, _trajectories_of),
}  # fmt: skip


def attack(kind, kills, seed=0):
    """(kills, kills that hit a save, mixtures or losses) of one kind, two writers at a time every other round."""
    write, read = KINDS[kind]
    draw, hit, wrong = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base) / kind
        folder.mkdir()
        write(folder, 1.0)
        start = time.perf_counter()
        write(folder, 1.0)
        once = time.perf_counter() - start
        for number in range(kills):
            children = [_child(write, folder, float(2 + n)) for n in range(1 + number % 2)]
            time.sleep(draw.random() * once * 2)
            for child in children:
                os.kill(child, signal.SIGKILL)
                hit += os.waitpid(child, 0)[1] != 0
            try:
                wrong += len(read(folder)) != 1
            except ValueError as error:
                print(kind, number, error, file=sys.stderr)
                wrong += 1
        write(folder, 9.0)
        wrong += read(folder) != {9.0}
    return kills, hit, wrong


def _child(write, folder, value):
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        while True:
            write(folder, value)
    return pid


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10_000, help="in all")
    parser.add_argument("--out", type=Path, help="a CSV, one row a kind")
    asked = parser.parse_args()
    rows = []
    for kind in KINDS:
        start = time.monotonic()
        kills, hit, wrong = attack(kind, -(-asked.kills // len(KINDS)))
        rows.append({"kind": kind, "kills": kills, "writers_killed": hit, "lost_or_mixed": wrong})
        rows[-1]["wall_s"] = round(time.monotonic() - start, 1)
        print(rows[-1], flush=True)
    table(rows, asked.out)
    return 1 if any(row["lost_or_mixed"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
