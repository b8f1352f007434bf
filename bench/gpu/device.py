"""The device that a step runs on: the GPU, or in a rehearsal (FASTEDIT_GPU_REHEARSAL=1) the CPU behind the same calls."""

import csv
import os
import pathlib
import time

import torch

from ..machine import about

REHEARSAL = os.environ.get("FASTEDIT_GPU_REHEARSAL") == "1"
NAME = "cpu" if REHEARSAL else "cuda"


def require():
    if not REHEARSAL and not torch.cuda.is_available():
        raise SystemExit(
            "this step needs an NVIDIA GPU that torch can see; FASTEDIT_GPU_REHEARSAL=1 rehearses it on the CPU"
        )


def synchronize():
    if not REHEARSAL:
        torch.cuda.synchronize()


def cache_bytes():
    """Of the last cache before memory."""
    return 1 << 16 if REHEARSAL else torch.cuda.get_device_properties(0).L2_cache_size


class HostEvent:
    """What torch.cuda.Event is to a GPU, on the CPU."""

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, later):
        return 1e3 * (later.at - self.at)


def event():
    return HostEvent() if REHEARSAL else torch.cuda.Event(enable_timing=True)


def captured(function):
    """A replay of `function` as one CUDA graph; in a rehearsal the function itself."""
    if REHEARSAL:
        return function
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = function()

    def replay(kept=kept):  # what was captured writes to memory that must not be given away
        graph.replay()

    return replay


def microseconds(function, calls):
    """Of one call, between events around so many."""
    first, last = event(), event()
    first.record()
    for _ in range(calls):
        function()
    last.record()
    synchronize()
    return 1e3 * first.elapsed_time(last) / calls


class Table:
    """A CSV that is on the disk after every row: a step that is stopped leaves what it knew."""

    def __init__(self, path, fields):
        self.where = about() if REHEARSAL is False else about() | {"machine": "rehearsal"}
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "w", newline="")  # noqa: SIM115
        self.rows = csv.DictWriter(self.file, (*fields, *self.where))
        self.rows.writeheader()

    def write(self, **row):
        self.rows.writerow(row | self.where)
        self.file.flush()
