"""The study: jobs in processes of their own, their figures into a CSV beside what earlier runs measured."""

import collections
import itertools
import json
import pathlib
import subprocess
import sys
import time

import torch

from ..machine import commit, machine
from . import cuts, rows
from .sizes import device, dtype

GRACE = 5  # seconds that a job may take beyond the minutes: one that is about to answer is worth them
ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def run(out, processes=5, minutes=None, full=False, sizes=None, kinds=None, works=None, names=None, say=print):
    """Measure into out/models-<device>.csv; returns its path.

    Passes over all jobs, `processes` of them, each job in a process of its own: what slowly changes about the machine
    is in the intervals. The CSV is written after every job. minutes: stop in time; what was not reached is said. A job
    that has started gets what is left of them and GRACE seconds.
    """
    path = pathlib.Path(out) / f"models-{device()}.csv"
    before, about = rows.read(path), _about()
    jobs = cuts.chosen(full, sizes, kinds, works)
    end = time.monotonic() + 60 * (minutes or float("inf"))
    results, skipped, longest = collections.defaultdict(list), collections.Counter(), collections.Counter()
    failures = []
    for turn, job in itertools.product(range(processes), jobs):
        if time.monotonic() + longest[job] > end:
            continue  # a shorter job may still fit
        start = time.monotonic()
        try:
            measured = measure(job, names, counting=turn == 0, seconds=end - start + GRACE)
        except MeasuringFailed as failure:
            say(str(failure))
            if not isinstance(failure, OutOfTime):  # which the caller has asked for
                failures.append(failure)
            continue
        for key, row in measured.items():
            results[key].append(row)
        longest[job] = max(longest[job], time.monotonic() - start)
        say(f"pass {turn + 1} of {processes}, {time.monotonic() - start:3.0f} s: {job}")
        rows.write(path, rows.merged(before, {k: _row(k, r, about) for k, r in results.items()}))
    for key, measured in results.items():
        row = _row(key, measured, about)
        say(_line(row))
        if not row["ratio"]:
            skipped[row["note"]] += 1
    for note, count in skipped.items():
        say(f"{count} rows without figures: {note}")
    _say_unreached(jobs, results, processes, say)
    if failures:
        raise MeasuringFailed(f"{len(failures)} measuring processes failed, the first of them:\n{failures[0]}")
    if jobs and not results:
        raise OutOfTime(f"nothing was measured in {minutes} minutes")
    return path


class MeasuringFailed(RuntimeError):
    """A measuring process ended without an answer."""


class OutOfTime(MeasuringFailed):
    """The minutes were over before an answer was there."""


def measure(job, names=None, counting=False, seconds=float("inf")):
    """{key: row of measure.py} of a job, from a process of its own that ends after so many seconds."""
    asked = {
        "size": job.size, "cells": job.cells, "names": names, "seconds": job.seconds,
        "compiled": job.compiled or bool(names), "counting": counting,
    }  # fmt: skip
    command = [sys.executable, "-m", "bench.models.measure", json.dumps(asked)]
    timeout = None if seconds == float("inf") else max(seconds, 0)
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise OutOfTime(f"{job}: stopped after {seconds:.0f} s: the time was over") from None
    if done.returncode:
        raise MeasuringFailed(f"{job}: exit status {done.returncode}\n{done.stderr[-4000:]}")
    return {
        (job.size, kind, work, variant): row
        for kind, work, variants in json.loads(done.stdout.splitlines()[-1])
        for variant, row in variants.items()
    }


def _about():
    import transformers

    return {
        "dtype": str(dtype()).removeprefix("torch."), "machine": machine(), "torch": torch.__version__,
        "transformers": transformers.__version__, "commit": commit(),
    }  # fmt: skip


def _row(key, measured, about):
    return dict(zip(rows.KEY, key, strict=True)) | rows.summary(measured) | about


def _line(row):
    figure = f"×{row['ratio']} ± {row['ratio_95']}" if row["ratio"] else row["note"]
    return f"{row['size']:10} {row['kind']:8} {row['work']:13} {row['variant']:20} {figure}"


def _say_unreached(jobs, results, processes, say):
    for job in jobs:
        keys = [key for key in results if key[0] == job.size and key[1:3] in job.cells]
        done = max((len(results[key]) for key in keys), default=0)
        if done < processes:
            say(f"not reached in time: {done} of {processes} processes of {job}")
