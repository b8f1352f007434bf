"""What the benchmarks of RE-Control share: the options, and one batch size after another into a CSV."""

import argparse
import csv
import pathlib

import torch

from fastedit.verifying.timing import quantiles

from .machine import about


def parser(description, rounds):
    """The options that both have; `rounds` by default."""
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    made.add_argument("--out", default="bench/results")
    made.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    made.add_argument("--steps", type=int, default=30)
    made.add_argument("--step-size", type=float, default=0.5)
    made.add_argument("--blocks", type=int, default=5)
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--append", action="store_true", help="to the CSV that is there")
    return made


def write(name, fields, options, measure, line):
    """<name>-<device>.csv: what measure(rows, options, device) yields for each of options.rows, each printed by line(row)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = pathlib.Path(options.out) / f"{name}-{device}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    where = about()
    with path.open("a" if options.append else "w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        if not options.append:
            writer.writeheader()
        for rows in options.rows:
            for row in measure(rows, options, device):
                writer.writerow(row | where)
                print(f"{rows:>3} rows  {row['variant']:<14}{row['us_p50']:>12} µs  {line(row)}")
    print(path)


def microseconds(times):
    """The columns us_p20, us_p50 and us_p80 of seconds."""
    return {f"us_p{share}": f"{t * 1e6:.1f}" for share, t in zip((20, 50, 80), quantiles(times), strict=True)}
