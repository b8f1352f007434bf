"""Micro-benchmarks of every op against its peers, interleaved; one CSV row a variant.

    python -m bench.micro [--out bench/results] [--full] [--op edit_add] [--minutes 3]

Columns: op, backend (or peer), mode, dtype, rows, width, rank, slots, µs p20/p50/p80, ratio to fastedit with the
half-width of its 95 % interval, bytes, GB/s, share of the copy bandwidth measured in the same case, machine, torch,
commit. On a CPU only the ratios mean anything beyond the machine.
"""

import argparse
import csv
import pathlib
import platform
import statistics
import subprocess
import sys
import time

import torch

from fastedit import dispatch

from . import cases
from .timing import interleave, quantiles, ratio

FIELDS = (
    "op", "backend", "mode", "dtype", "rows", "width", "rank", "slots", "us_p20", "us_p50", "us_p80", "ratio",
    "ratio_95", "bytes", "gb_s", "share_of_copy", "machine", "torch", "commit",
)  # fmt: skip


def machine():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    from fastedit import _native

    return f"{platform.machine()} {_native.instruction_set()} {torch.get_num_threads()} threads"


def commit():
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True,
            cwd=pathlib.Path(__file__).parent,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def measure(case, device, blocks=5, rounds=5):
    """CSV rows of one case."""
    chosen = dispatch.select(device, cases.DTYPES[case.dtype]).__name__
    medians = interleave(cases.variants(case, device), blocks=blocks, rounds=rounds)
    copy = statistics.median(medians["copy"])
    for name, times in medians.items():
        p20, p50, p80 = quantiles(times)
        against, half = ratio(medians, name, "fastedit")
        yield {
            "op": case.op, "backend": chosen if name == "fastedit" else name, "mode": case.mode, "dtype": case.dtype,
            "rows": case.rows, "width": case.width, "rank": case.rank, "slots": case.slots,
            "us_p20": f"{p20 * 1e6:.2f}", "us_p50": f"{p50 * 1e6:.2f}", "us_p80": f"{p80 * 1e6:.2f}",
            "ratio": f"{against:.3f}", "ratio_95": f"{half:.3f}", "bytes": case.bytes(),
            "gb_s": f"{case.bytes() / p50 / 1e9:.1f}", "share_of_copy": f"{copy / p50:.3f}",
        }  # fmt: skip


def run(out, full=False, op=None, minutes=3.0, device=None):
    """Measure into out/micro-<device>.csv, within the minutes: whatever is not reached is said, never skipped silently."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"micro-{device}.csv"
    wanted = [c for c in cases.cut(full, device) if op in (None, c.op)]
    # Large and small, op by op, in turn: a run cut short has still seen something of everything.
    wanted = sorted(wanted, key=lambda c: (-c.rows * c.width, c.rank, c.mode, c.op))
    about = {"machine": machine(), "torch": torch.__version__, "commit": commit()}
    end, done = time.monotonic() + 60 * minutes, 0
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for case in wanted:
            if time.monotonic() > end:
                break
            for row in measure(case, device):
                writer.writerow(row | about)
            file.flush()
            done += 1
            print(f"\r{done}/{len(wanted)} {case.id():<50}", end="", file=sys.stderr)
    print(f"\n{path}: {done} of {len(wanted)} cases in {minutes:g} minutes", file=sys.stderr)
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="bench/results")
    parser.add_argument("--full", action="store_true", help="every combination instead of the cut")
    parser.add_argument("--op", choices=cases.OPS)
    parser.add_argument("--minutes", type=float, default=3.0)
    options = parser.parse_args()
    path = run(options.out, options.full, options.op, options.minutes)
    from . import plot

    print(plot.roofline(path))


if __name__ == "__main__":
    main()
