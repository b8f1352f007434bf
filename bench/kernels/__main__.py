"""python -m bench.kernels: see the package."""

import argparse

from . import plot, study, table
from .cases import GATED, OPS


def main():
    parser = argparse.ArgumentParser(description="The kernel study: ops beside their peers, one CSV row a variant.")
    parser.add_argument("--out", default="bench/results")
    parser.add_argument("--full", action="store_true", help="every combination instead of sweeps around one shape")
    parser.add_argument("--op", choices=(*OPS, GATED))
    parser.add_argument("--minutes", type=float, default=6.0)
    options = parser.parse_args()
    path = study.run(options.out, options.full, options.op, options.minutes)
    print(table.share_of_limit(path), plot.roofline(path), sep="\n")


if __name__ == "__main__":
    main()
