"""Everything that `make bench` measures on a CPU: both studies, their tables and pictures, and docs/performance.md.

    python -m bench.cpu --out bench/results
"""

import argparse

from . import host, models, report
from .kernels import plot, study
from .models import plot as models_plot
from .models import table as models_table


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="bench/results")
    parser.add_argument("--full", action="store_true", help="every combination")
    parser.add_argument("--minutes", type=float, default=6.0, help="for the kernel study")
    parser.add_argument("--models", type=float, default=None, help="minutes for the model study")
    parser.add_argument("--processes", type=int, default=5, help="for each figure of the models")
    options = parser.parse_args()
    path = study.run(options.out, full=options.full, minutes=options.minutes, device="cpu")
    print(path, plot.roofline(path), sep="\n")
    print(host.run(options.out, device="cpu"))
    found = models.run(options.out, processes=options.processes, minutes=options.models, full=options.full)
    print(found, models_table.write(found), *models_plot.ratios(found), sep="\n")
    print(*report.write(options.out), sep="\n")


if __name__ == "__main__":
    main()
