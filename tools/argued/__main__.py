"""make arguments: the campaign over all ops and all targets; a CSV row each."""

import argparse
import logging
import random
import sys
import time
import warnings
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import given as by_hypothesis

from .. import table
from . import models, ops

FIELDS = ("call", "calls", "served", "refused", "findings", "wall_s")
SHOWN = 12  # findings of one call


def campaign(calls, given, run, about, count, number=0, quick=False):
    """({calls, served, refused, findings}, what was found) of `count` drawn calls(*given). quick: drawn without hypothesis."""
    row, found = dict.fromkeys(FIELDS[1:5], 0), []

    def one(drawn):
        why, served = run(drawn)
        row["calls"] += 1
        row["served" if served else "refused"] += 1
        if why is not None:
            row["findings"] += 1
            if len(found) < SHOWN:
                found.append(f"{why}\n    {about(drawn)}")

    if quick:
        for turn in range(count):
            one(calls.at_random(random.Random(f"{number} {turn}"), *given))
        return row, found
    some = settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
    )
    seed(number)(some(by_hypothesis(calls(*given))(one)))()
    return row, found


def over_ops(name, count, number=0, quick=False):
    return campaign(ops.calls, (name,), ops.run, repr, count, number, quick)


def over_models(world, name, count, number=0, quick=False):
    def run(drawn):
        why, served = models.run(world, name, drawn[0])
        if world.changed():
            world.__init__(world.folder)  # the next call begins with a sound one
        return why, served

    return campaign(models.calls, (name,), run, lambda drawn: f"{name}({models.about(drawn[0])})", count, number, quick)


def main():
    parser = argparse.ArgumentParser(prog="python -m tools.argued", description=__doc__)
    parser.add_argument("--calls", type=int, default=100_000, help="of each op")
    parser.add_argument("--model-calls", type=int, default=1_000, help="of each function that takes a model")
    parser.add_argument("--only", nargs="*", help="names of ops and targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hypothesis", action="store_true", help="drawn by hypothesis, more slowly")
    parser.add_argument("--out", type=Path, help="a CSV, one row a function")
    asked = parser.parse_args()
    logging.disable(logging.CRITICAL), warnings.simplefilter("ignore"), torch.set_num_threads(1)
    rows = []

    def record(name, campaign, *arguments):
        if asked.only and name not in asked.only:
            return
        begun = time.monotonic()
        row, found = campaign(*arguments)
        rows.append({"call": name} | row | {"wall_s": round(time.monotonic() - begun, 1)})
        print(rows[-1], *found, sep="\n", flush=True)
        table(rows, asked.out)

    for name in ops.OPS:
        record(name, over_ops, name, asked.calls, asked.seed, not asked.hypothesis)
    with models.world() as world:
        for name in models.TARGETS:
            record(name, over_models, world, name, asked.model_calls, asked.seed, not asked.hypothesis)
    return 1 if any(row["findings"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
