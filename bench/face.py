"""The face's bars in one run: what an op costs on one row, and what a patched Llama costs a decode step.

    OMP_NUM_THREADS=1 python -m bench.face --out bench/results

Writes face-cpu.csv: one line a ratio, its bar, its 95 % interval, and the interval's like of the base against itself (the A/A
row). Everything of a group takes turns; a ratio is the median of at least fifteen blocks' ratios. Takes about five minutes.
"""

import argparse
import csv
import pathlib
import statistics

import numpy as np
import torch

from fastedit import arrays, ops
from fastedit.verifying.timing import interleave, ratio

from .machine import about
from .models import check
from .models.measure import Cell
from .models.sizes import SIZES, build

FIELDS = ("group", "call", "over", "bar", "ratio", "ratio_95", "met", "us", "machine", "torch", "commit")
WIDTH, BLOCKS = 64, 15


def on_one_row():
    """{group: ({name: function}, [(call, over, bar)])}: fp32, one row of WIDTH columns; the eager expression is `eager`."""
    h, r, read = torch.randn(1, WIDTH), torch.randn(1, WIDTH), torch.randn(4, WIDTH)
    s, b, weight = (torch.rand(WIDTH) + 0.5 for _ in range(3))
    trained, seed = s.clone().requires_grad_(), torch.ones_like(h)
    hn, sn, bn = h.numpy(), s.numpy(), b.numpy()

    def normed():
        return torch.nn.functional.rms_norm(r + (s * h + b), (WIDTH,), weight, 1e-6)

    def step(out):
        return torch.autograd.grad(out, trained, seed)

    pairs = {
        "ops.edit": (lambda: s * h + b, lambda: ops.edit(h, s, b), 0.5),
        "ops.edit_add": (lambda: r + s * h + b, lambda: ops.edit_add(h, r, s, b), 0.35),
        "ops.edit_add beside the plain add": (lambda: r + h, lambda: ops.edit_add(h, r, s, b), 1.5),
        "ops.edit_add_norm": (normed, lambda: ops.edit_add_norm(h, r, weight, s, b), 0.2),
        "ops.project": (lambda: h @ read.T, lambda: ops.project(h, read), 1.0),
        "arrays.edit on NumPy": (lambda: sn * hn + bn, lambda: arrays.edit(hn, sn, bn), 1.0),
        "ops.edit, forward and backward": (lambda: step(trained * h + b), lambda: step(ops.edit(h, trained, b)), 2.0),
    }
    assert np.allclose(arrays.edit(hn, sn, bn), sn * hn + bn)
    for name, (eager, ours, bar) in pairs.items():
        yield name, {"eager": eager, "eager again": eager, name: ours}, [(name, "eager", bar)]


MODELS = {  # size: [(call, over, bar)]; no bar: beside main, run by run
    "64x5": [("fastedit", "unedited", 0.95), ("hook", "unedited", None), ("fastedit plain", "hook", 1.0),
             ("fastedit compiled", "hook compiled", 1.0)],
    "256x8": [("fastedit", "unedited", None), ("fastedit plain", "hook", 1.0)],
    "512x8": [("fastedit", "unedited", None), ("fastedit plain", "hook", 1.0)],
}  # fmt: skip


def in_a_model():
    """The same for a decode step of a Llama whose every layer's FFN output has a scale and a bias."""
    for size, rows in MODELS.items():
        names = {"unedited", "unedited again"} | {n for call, over, _ in rows for n in (call, over)}
        cell = Cell(build(SIZES[size]), SIZES[size], "red", "decode", names)
        reference, steps = check.Reference(cell.base, cell.values, "decode"), {}
        for name, variant in cell.variants.items():
            row, step = cell.checked(variant, reference)
            if step is None:
                raise RuntimeError(f"{size} {name}: {row['note']}")
            steps[name] = step
        yield f"decode {size}", steps, rows


def measured():
    for groups, base, rounds in ((on_one_row(), "eager", 100), (in_a_model(), "unedited", 15)):
        for group, functions, rows in groups:
            for function in functions.values():
                for _ in range(20):
                    function()
            medians = interleave(functions, blocks=BLOCKS, rounds=rounds)
            for call, over, bar in ((f"{base} again", base, None), *rows):
                yield row_of(group, call, over, bar, medians)


def row_of(group, call, over, bar, medians):
    found, half = ratio(medians, call, over)
    return {
        "group": group, "call": call, "over": over, "bar": "" if bar is None else bar, "ratio": f"{found:.3f}",
        "ratio_95": f"{half:.3f}", "met": "" if bar is None else ("yes" if found <= bar else "no"),
        "us": f"{statistics.median(medians[call]) * 1e6:.2f}",
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="bench/results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    path = pathlib.Path(given.out) / "face-cpu.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    where = about()
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for row in measured():
            writer.writerow(row | where)
            file.flush()
            print(*(f"{row[name]:>24}" for name in FIELDS[:8]), flush=True)
    print(path)


if __name__ == "__main__":
    main()
