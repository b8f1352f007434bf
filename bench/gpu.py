"""The GPU lane's benchmarks: micro-benchmarks and their picture, into a folder.

    python -m bench.gpu --out bench/results --minutes 3
"""

import argparse

import torch

from . import micro


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="bench/results")
    parser.add_argument("--minutes", type=float, default=3.0)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench.gpu needs an NVIDIA GPU; `python -m bench.micro` measures the CPU")
    path = micro.run(options.out, minutes=options.minutes, device="cuda")
    from . import plot

    print(path, plot.roofline(path), sep="\n")


if __name__ == "__main__":
    main()
