"""make crashes: writers of every kind are killed at a random moment; what is there afterwards is the old or the new, whole.

    python -m tools.crashes --kills 10000 --out bench/results/crashes.csv
"""

import argparse
import contextlib
import functools
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

import fastedit as fe
from fastedit import store
from fastedit.capturing import capture as capturing
from fastedit.capturing.rows_on_disk import Rows, RowWriter
from fastedit.directions import sweep as sweeping
from fastedit.files import edit_file
from fastedit.files.edit_file import EditFileError
from fastedit.methods import trajectories
from fastedit.methods.trajectories import Trajectories

from . import table
from .readers import WIDTH, model

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


# What needs transformers imports it where it runs: a fork of a process that holds it costs three times as much.


@functools.cache
def _trainee():
    """A model with an edit that trains, and a head beside it, as EditTrainer saves them at a checkpoint."""
    from transformers import LlamaForSequenceClassification

    llama = LlamaForSequenceClassification(model().config)
    return llama, fe.patch(llama, fe.RED(), freeze=True)


def _checkpoint(folder, value):
    from fastedit.training import recipes

    llama, handle = _trainee()
    with torch.no_grad():
        for tensor in (*handle.parameters(), llama.score.weight):
            tensor.fill_(value)
    recipes.save_trained(llama, handle, folder, training={"step": value})


def _checkpoint_of(folder):
    from fastedit.training import recipes

    llama, handle = _trainee()
    recipes.load_trained(llama, handle, folder)
    found = {tensor.unique().item() for tensor in (*handle.parameters(), llama.score.weight)}
    return found | {store.read(folder)[0]["training"]["step"]}


class _At:
    """Where a pass over data is: the part of a capture's windows that its state keeps."""

    def __init__(self, value):
        self.position, self.digest = int(value), self

    def hexdigest(self):
        return str(float(self.position))


def _resume(folder, value):
    moments = fe.Moments(512)
    sums = {name: torch.full((1, 512), value, dtype=torch.float64) for name in ("mean", "m2")}
    moments.load_state_dict({"count": torch.tensor([3]), **sums})
    capturing._State(folder, JOB, 0).save({1: moments}, {1: torch.tensor(int(value))}, _At(value), now=True)


def _resume_of(folder):
    note, tensors = capturing._State(folder, JOB, 0)._read()
    found = {t.unique().item() for name, t in tensors.items() if not name.endswith("count")}
    return {float(note["position"]), float(note["digest"]), *map(float, found)}


_SWEPT = {"directions": "of this sweep"}


def _sweep(folder, value):
    kept = sweeping._Kept(folder, _SWEPT)
    for layer in (0, 1):
        kept.cells[(layer,), 1.0] = sweeping.Cell((layer,), 1.0, value, value, value, value, 3)
    kept.add(kept.cells[(1,), 1.0])


def _sweep_of(folder):
    return {cell.mean for cell in sweeping._Kept(folder, _SWEPT).cells.values()}


def _plan(folder, value):
    """A folder of shards has one plan for good: the old one is taken away. The second of two writers may be refused."""
    (folder / trajectories._PLAN).unlink(missing_ok=True)
    with contextlib.suppress(EditFileError):
        trajectories._begin(folder, {"prompts": value}, int(value))


def _plan_of(folder):
    return {float(trajectories._plan(folder)["shards"])} if (folder / trajectories._PLAN).exists() else {NOTHING}


def _peft(folder, value):
    with fe.patch(model(), fe.ScaleBias(torch.full((WIDTH,), value), bias=False, site="mlp")) as handle:
        fe.save_peft(handle, folder, task_type=str(value))


def _peft_of(folder):
    return _adapter_of(folder, "adapter_config.json", lambda config: float(config["task_type"]))


def _pyreft(folder, value):
    with fe.patch(model(), fe.Steer(torch.full((WIDTH,), value), layers=range(1 + int(value) % 2))) as handle:
        fe.save_pyreft(handle, folder)


def _pyreft_of(folder):
    return _adapter_of(folder, "config.json", lambda config: None, positions="all")


def _adapter_of(folder, name, said, positions=None):
    """What all of an adapter's places hold, and its configuration; NOTHING where there is none, as PEFT and pyreft see it."""
    try:
        with fe.load_adapter(model(), folder, positions=positions) as handle:
            found = {said(json.loads((folder / name).read_bytes()))} - {None}
            for *_, masters in handle._each():
                form = masters.form()
                found |= {round(x, 3) for x in (form.offset @ form.write if form.scale is None else form.scale).tolist()}
            return found
    except fe.EditFileError:
        if (folder / name).exists():
            raise
        return {NOTHING}


def _bank(folder, value):
    """A bank that keeps nothing in memory; what a killed one leaves behind must not be in the way of the next."""
    bank = fe.Bank(model(), capacity=1, rank=0, host=0, folder=folder)
    for number in range(3):
        bank.add(f"e{number}", fe.Steer(torch.full((WIDTH,), value + number), site="mlp"))
    for number in range(3):
        bank.prefetch([f"e{number}"])
        bias = bank.tables.tensors(bank._served[0][0].name, "mlp")[1]
        assert bias.unique().item() == value + number
    bank.close()


def _bank_of(folder):
    _bank(folder, 9.0)
    return {9.0}


SAVED = {
    "edit": (_edit, _edit_of), "directions": (_directions, _directions_of), "rows": (_rows, _rows_of),
    "trajectories": (_trajectories, _trajectories_of), "resume": (_resume, _resume_of),
    "checkpoint": (_checkpoint, _checkpoint_of), "sweep": (_sweep, _sweep_of), "plan": (_plan, _plan_of),
    "peft": (_peft, _peft_of), "pyreft": (_pyreft, _pyreft_of),
}  # fmt: skip
NOTHING = 0.0
MAY_BE_NOTHING = ("plan", "peft", "pyreft")  # after a crash: none of it can be loaded, by anybody
KINDS = {**SAVED, "bank": (_bank, _bank_of)}


def attack(kind, kills, seed=0, where=None):
    """(rounds, writers killed while they wrote, mixtures or losses) of one kind, two writers at a time every other round."""
    write, read = KINDS[kind]
    draw, hit, wrong = random.Random(seed), 0, 0
    begun, begin = os.pipe()
    with tempfile.TemporaryDirectory(dir=where) as base:
        folder = Path(base) / kind
        folder.mkdir()
        write(folder, 1.0)
        start = time.perf_counter()
        write(folder, 1.0)
        once = time.perf_counter() - start
        for number in range(kills):
            children = [_child(write, folder, float(2 + n), begin) for n in range(1 + number % 2)]
            for _ in children:  # on a busy machine a writer would else be killed before it began
                os.read(begun, 1)
            time.sleep(draw.random() * once * 2)
            for child in children:
                os.kill(child, signal.SIGKILL)
                status = os.waitpid(child, 0)[1]
                hit += status == signal.SIGKILL
                wrong += status != signal.SIGKILL  # it failed
            try:
                found = read(folder)
                wrong += len(found) != 1 or (found == {NOTHING} and kind not in MAY_BE_NOTHING)
            except ValueError as error:
                print(kind, number, error, file=sys.stderr)
                wrong += 1
        write(folder, 9.0)
        wrong += read(folder) != {9.0}
    os.close(begun), os.close(begin)
    return kills, hit, wrong


def _child(write, folder, value, begin):
    """The process that writes again and again, from a byte in the pipe `begin` on."""
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            os.write(begin, b".")
            while True:
                write(folder, value)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return pid


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10_000, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the files are; a file system in memory is several times as fast")
    parser.add_argument("--only", nargs="*", choices=KINDS, help="some of the kinds")
    parser.add_argument("--out", type=Path, help="a CSV, one row a kind")
    asked = parser.parse_args()
    rows = []
    kinds = asked.only or list(KINDS)
    for kind in kinds:
        start = time.monotonic()
        kills, hit, wrong = attack(kind, -(-asked.kills // len(kinds)), asked.seed, asked.folder)
        rows.append({"kind": kind, "kills": kills, "writers_killed": hit, "lost_or_mixed": wrong})
        rows[-1]["wall_s"] = round(time.monotonic() - start, 1)
        print(rows[-1], flush=True)
        table(rows, asked.out)
    return 1 if any(row["lost_or_mixed"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
