"""One process's measurements of a job: some kinds of edit and works on one size. Prints one line of JSON.

    python -m bench.models.measure '{"size": "64x5", "cells": [["red", "decode"]], "seconds": 3}'
"""

import copy
import gc
import json
import statistics
import sys

import torch

from fastedit.verifying.timing import interleave, ratio, time_once

from . import check, counts
from .edits import values as draw
from .registry import TRAINING, base_of, serving
from .sizes import SIZES, build, sharing, shortened
from .works import WORKS

BLOCKS, ROUNDS = 5, 9


def measure(size, cells, names=None, seconds=6.0, compiled=True, counting=False):
    """[(kind, work, {variant: row})]: a row has `ratio` and `ms`, or a `note` that says why not; counting adds counts.

    cells: (kind, work) pairs. names: of the variants, None for all. seconds: about what the timing of one cell may
    take. compiled: False leaves the compiled variants out.
    """
    base = build(SIZES[size])
    return [
        (kind, work, Cell(base, SIZES[size], kind, work, names, compiled).rows(seconds, counting))
        for kind, work in cells
    ]


class Cell:
    """One size, kind and work: all its variants side by side."""

    def __init__(self, base, size, kind, work, names=None, compiled=True):
        self.base, self.size, self.work = base, size, WORKS[work]
        self.values = draw(kind, base, work in TRAINING)
        chosen = serving(size.family, kind, work, names)
        self.variants = {v.name: v for v in chosen if compiled or not v.compiled}

    def rows(self, seconds, counting):
        torch._dynamo.reset()  # the compiled models of the work before
        found, steps = {}, {}
        reference = check.Reference(self.base, self.values, self.work.name)
        for name, variant in self.variants.items():
            found[name], steps[name] = self.checked(variant, reference)
        del reference
        gc.collect()
        steps = {name: step for name, step in steps.items() if step is not None}
        for name, timed in self.timed(steps, seconds).items():
            found[name] |= timed
        if counting:
            for name, step in steps.items():
                found[name] |= self.counted(self.variants[name], step)
        return found

    def checked(self, variant, reference):
        """(row, step) of a variant whose result is right; (row that says why not, None) of another."""
        missing = variant.missing()
        if missing:
            return {"note": f"skipped: {missing}"}, None
        try:
            model, note = construct(variant, self.base, self.values)
            step = self.work.prepare(model, self.base) if not self.work.training else None
            if variant.same_edit:
                error = reference.error(model, step)
                if not error <= reference.limit:
                    raise ValueError(f"off by {error:.2e} where the plain hook's edit allows {reference.limit:.2e}")
            row = {"note": "; ".join(part for part in (variant.note, note) if part)}
            if self.work.training:
                row["trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
                step = self.work.prepare(model, self.base)
            return row, step
        except Exception as error:  # a peer's failure is a row of the table, not the end of the others
            return {"note": f"not timed: {type(error).__name__}: {' '.join(str(error).split())[:240]}"}, None

    def timed(self, steps, seconds):
        """{variant: {ratio, ms}}"""
        for step in steps.values():
            step()  # compiles, and makes what optimizers keep
        once = sum(time_once(step) for step in steps.values())
        rounds = max(1, min(ROUNDS, round(seconds / (BLOCKS * once))))
        blocks = max(2, min(BLOCKS, round(seconds / (rounds * once))))
        medians = interleave(steps, blocks=blocks, rounds=rounds, warmup=0)
        base = base_of(self.work.name)
        return {n: {"ratio": ratio(medians, n, base)[0], "ms": statistics.median(t) * 1e3} for n, t in medians.items()}

    def counted(self, variant, step):
        """{ops_layer, bytes_layer} and, for training, peak_bytes."""
        row = {"peak_bytes": counts.peak_bytes(step)} if self.work.training else {}
        if variant.compiled or self.work.name.startswith("generate"):
            return row  # what was compiled makes no calls to count; generation repeats decoding

        def prepare(layers):
            short = shortened(self.base, layers)
            return self.work.prepare(construct(variant, short, self.values.first(layers))[0], short)

        operations, size = counts.per_layer(prepare)
        return row | {"ops_layer": operations, "bytes_layer": size}


def construct(variant, base, values):
    """(what the works drive, note) of a variant, on a model of its own that shares the base's weights if it may."""
    model = copy.deepcopy(base) if variant.own_weights else sharing(base)
    built = variant.build(model, values)
    return built if isinstance(built, tuple) else (built, "")


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
