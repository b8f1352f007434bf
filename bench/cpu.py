"""Everything that `make bench` measures on a CPU: micro-benchmarks, the picture, and the models.

    python -m bench.cpu --out bench/results
"""

import argparse

from . import micro, models, plot


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="bench/results")
    parser.add_argument("--full", action="store_true", help="every combination of the micro-benchmarks")
    parser.add_argument("--minutes", type=float, default=3.0, help="for the micro-benchmarks")
    parser.add_argument("--processes", type=int, default=5, help="for each figure of the models")
    options = parser.parse_args()
    path = micro.run(options.out, full=options.full, minutes=options.minutes, device="cpu")
    print(path, plot.roofline(path), sep="\n")
    print(models.run(options.out, processes=options.processes))


if __name__ == "__main__":
    main()
