"""python -m bench.models: see the package."""

import argparse

from . import plot, study, table
from .registry import KINDS, WORKS, variants
from .sizes import SIZES


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.models", description="What editing costs a model.")
    parser.add_argument("--out", default="bench/results")
    parser.add_argument("--processes", type=int, default=5, help="a figure is the median over so many")
    parser.add_argument("--minutes", type=float, help="stop in time, and say what was not reached")
    parser.add_argument("--full", action="store_true", help="every size, kind and work instead of the default cut")
    parser.add_argument("--csv", action="store_true", help="neither a table nor pictures of it")
    for name, choices in (("size", SIZES), ("kind", KINDS), ("work", WORKS), ("variant", variants())):
        told = {"metavar": name.upper(), "help": ", ".join(choices)}
        parser.add_argument(f"--{name}", choices=choices, action="append", **told)
    chosen = parser.parse_args()
    path = study.run(
        chosen.out, chosen.processes, chosen.minutes, chosen.full, chosen.size, chosen.kind, chosen.work, chosen.variant
    )
    print(path, *(() if chosen.csv else (table.write(path), *plot.ratios(path))), sep="\n")


if __name__ == "__main__":
    main()
