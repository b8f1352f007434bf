"""The GPU lane's benchmarks: a cut of both studies, their tables and pictures, into a folder.

    python -m bench.gpu --out bench/results --minutes 2.5 --models 1.5
"""

import argparse

import torch

from . import host
from .kernels import plot, study, table


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="bench/results")
    parser.add_argument("--minutes", type=float, default=2.5, help="for the kernel study")
    parser.add_argument("--models", type=float, default=1.5, help="minutes for the model study; 0: none")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench.gpu needs an NVIDIA GPU; `python -m bench.cpu` measures the CPU")
    path = study.run(options.out, minutes=options.minutes, device="cuda")
    print(path, table.share_of_limit(path), table.one_row(path), sep="\n")
    try:
        print(plot.roofline(path))
    except ImportError as error:
        print(f"no picture: {error}")
    print(host.table(host.run(options.out)))
    if options.models:
        from . import models
        from .models import table as models_table

        found = models.run(options.out, processes=3, minutes=options.models)
        print(found, models_table.markdown(found), sep="\n")


if __name__ == "__main__":
    main()
