"""One training run under `accelerate launch` with DDP on the CPU (where accelerate has no FSDP), its resumption, and a capture.

    ACCELERATE_USE_CPU=true accelerate launch --num_processes 2 ... tests/accelerate_worker.py FOLDER

The first process writes what came out as JSON into FOLDER, each one its moments; test_distributed.py compares them.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from distributed_worker import RESUME_AT, STEPS, batch, loss_of, model_and_handle, optimizer_of
from tiny_models import build, exact, sequences

import fastedit as fe


def train(accelerator, model, optimizer, steps, before_step=lambda step: None):
    losses = []
    for step in steps:
        before_step(step)
        loss = loss_of(model, batch(step).chunk(accelerator.num_processes)[accelerator.process_index])
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        share = loss.detach() / accelerator.num_processes
        dist.all_reduce(share)
        losses.append(float(share))
    return losses


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    accelerator = Accelerator()
    model, handle = model_and_handle()
    model, optimizer = accelerator.prepare(model, optimizer_of(model))

    def save(step):
        if step == RESUME_AT:
            accelerator.save_state(folder / "point")

    losses = train(accelerator, model, optimizer, range(STEPS), save)
    accelerator.load_state(folder / "point")
    resumed = train(accelerator, model, optimizer, range(RESUME_AT, STEPS))
    if accelerator.is_main_process:
        handle.save(folder / "edit")
        found = {"mode": accelerator.distributed_type.value, "losses": losses, "resumed": resumed}
        found["dtypes"] = sorted({str(t.dtype) for t in handle.named_tensors().values()})
        (folder / "results.json").write_text(json.dumps(found))
    captured = fe.capture(exact(build("llama")), None, sequences(50), batch_size=4, processes=PartialState())
    sums = {str(layer): [moments.count.tolist(), moments.mean().tolist()] for layer, moments in captured.items()}
    (folder / f"moments-{accelerator.process_index}.json").write_text(json.dumps(sums))
    sys.stdout.flush()
    accelerator.wait_for_everyone()
    os._exit(0)  # leaving a gloo group of accelerate's may wait forever


if __name__ == "__main__":
    main()
