"""Measures the cases, their variants interleaved; one CSV row a variant.

Columns: op, backend (or peer), mode, dtype, rows, width, rank, slots, µs p20/p50/p80, ratio to fastedit with the
half-width of its 95 % interval, bytes, GB/s, share of the speed of a copy of the same bytes measured in the same case
(between warm buffers, and into fresh memory), machine, torch, commit. On a CPU only the ratios mean anything beyond
the machine.
"""

import csv
import pathlib
import statistics
import sys
import time

import torch

from fastedit import dispatch
from fastedit.verifying.timing import interleave, quantiles, ratio

from ..machine import about
from . import cases

FIELDS = (
    "op", "backend", "mode", "dtype", "rows", "width", "rank", "slots", "us_p20", "us_p50", "us_p80", "ratio",
    "ratio_95", "bytes", "gb_s", "share_of_copy", "share_of_clone", "machine", "torch", "commit",
)  # fmt: skip


def measure(case, device, blocks=5, rounds=5):
    """CSV rows of one case."""
    chosen = dispatch.select(device, cases.DTYPES[case.dtype]).__name__
    medians = interleave(cases.variants(case, device), blocks=blocks, rounds=rounds)
    copy, clone = (statistics.median(medians[name]) for name in ("copy", "clone"))
    for name, times in medians.items():
        p20, p50, p80 = quantiles(times)
        against, half = ratio(medians, name, "fastedit")
        yield {
            "op": case.op, "backend": chosen if name == "fastedit" else name, "mode": case.mode, "dtype": case.dtype,
            "rows": case.rows, "width": case.width, "rank": case.rank, "slots": case.slots,
            "us_p20": f"{p20 * 1e6:.2f}", "us_p50": f"{p50 * 1e6:.2f}", "us_p80": f"{p80 * 1e6:.2f}",
            "ratio": f"{against:.3f}", "ratio_95": f"{half:.3f}", "bytes": case.bytes(),
            "gb_s": f"{case.bytes() / p50 / 1e9:.1f}", "share_of_copy": f"{copy / p50:.3f}",
            "share_of_clone": f"{clone / p50:.3f}",
        }  # fmt: skip


def run(out, full=False, op=None, minutes=6.0, device=None):
    """Measure into out/kernels-<device>.csv, the telling cases first; what the minutes do not reach is said."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"kernels-{device}.csv"
    wanted = [c for c in cases.cut(full, device) if op in (None, c.op)]
    where = about()
    end, done = time.monotonic() + 60 * minutes, 0
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for case in wanted:
            if time.monotonic() > end:
                break
            for row in measure(case, device):
                writer.writerow(row | where)
            file.flush()
            done += 1
            print(f"\r{done}/{len(wanted)} {case.id():<50}", end="", file=sys.stderr)
    print(f"\n{path}: {done} of {len(wanted)} cases in {minutes:g} minutes", file=sys.stderr)
    return path
