"""The contract of docs/reliability.md: what may run beside forwards of other threads. tools/threads.py does it at length."""

import multiprocessing
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_models as tiny
import torch
from torch.utils.data import DataLoader

import fastedit as fe
from fastedit import ops
from fastedit.patching import under_way
from tools.threads import OPERATIONS, Crowd, beside


@pytest.mark.parametrize("name", OPERATIONS)
def test_forwards_beside(name):
    done, turns, wrong = beside(name, 200)
    assert not wrong and done >= 200 and turns


def test_a_torn_state_would_be_seen():
    """An edit replaced meanwhile, where the crowd expects the one before: it says so."""
    crowd = Crowd()
    try:
        crowd.forwards(10_000, lambda turn: crowd.bank.replace("e0", fe.Steer(torch.full((16,), turn + 1.0), site="mlp")))
        assert "is of no state that there was" in crowd.wrong[0]
    finally:
        crowd.close()


def test_changes_of_the_model_beside_forwards_are_made_between_them(tmp_path, monkeypatch):
    monkeypatch.setattr(under_way, "PATIENCE", 0.01)
    crowd = Crowd()
    try:
        operation = OPERATIONS["changes of the model"](crowd, tmp_path)
        crowd.forwards(300, operation)
        assert not crowd.wrong and operation.refused and operation.made["patch"]
    finally:
        crowd.close()


ROOT = Path(__file__).resolve().parents[2]


def edited(rows):
    return ops.edit(rows, torch.full((8,), 2.0))


def test_workers_of_a_data_loader_and_spawned_processes_edit():
    data = [torch.full((2, 8), float(n)) for n in range(6)]
    for rows in DataLoader(data, batch_size=2, num_workers=2, collate_fn=lambda batch: edited(torch.stack(batch))):
        assert rows.shape == (2, 2, 8) and (rows[:, 0, 0] % 2 == 0).all()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert torch.equal(pool.map(edited, [torch.ones(2, 8)])[0], torch.full((2, 8), 2.0))


def test_a_pickled_model_is_edited_as_it_was():
    model, given = tiny.build("llama"), tiny.inputs("llama")
    with fe.patch(model, fe.Steer(torch.ones(tiny.WIDTH))), torch.no_grad():
        found = pickle.loads(pickle.dumps(model))
        assert torch.equal(found(**given).logits, model(**given).logits)


INTERRUPTED = """
import signal, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell starts in the background
import fastedit as fe
from tools.readers import model
from tools.soak import _logits
llama = model()
before, count = _logits(llama), 0
print("ready", flush=True)
while True:
    try:
        with fe.patch(llama, fe.RED()) as handle:
            while True:
                _logits(llama)
    except KeyboardInterrupt:
        assert torch.equal(_logits(llama), before) and "fastedit" not in llama._modules
        count += 1
        print("interrupted", count, flush=True)
        if count == 3:
            break
"""


def test_ctrl_c_in_a_forward_gives_the_model_back():
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout.readline() == "ready\n"
        for count in range(3):
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == f"interrupted {count + 1}\n"
        assert process.wait(60) == 0
    finally:
        process.kill()
