"""The GPU lane's benchmarks: micro-benchmarks and their picture, and the models if asked, into a folder.

    python -m bench.gpu --out bench/results --minutes 4
"""

import argparse

import torch

from . import micro


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="bench/results")
    parser.add_argument("--minutes", type=float, default=4.0, help="for the micro-benchmarks")
    parser.add_argument("--models", type=float, default=0.0, metavar="MINUTES", help="for the models; 0: none")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench.gpu needs an NVIDIA GPU; `python -m bench.micro` measures the CPU")
    path = micro.run(options.out, minutes=options.minutes, device="cuda")
    from . import plot

    print(path, plot.roofline(path), sep="\n")
    if options.models:
        from . import models

        print(models.run(options.out, minutes=options.models))


if __name__ == "__main__":
    main()
