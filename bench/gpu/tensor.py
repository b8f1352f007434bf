"""The kernels on tensor cores, which are off by default (FASTEDIT_TENSOR), against float64 and beside those that are on.

    python -m bench.gpu.tensor --out bench/results        on a GPU, with nvcc; ends with 1 where a result is wrong

Writes gpu-tensor.csv: the median time of a launch and its partials' sum, both kinds taking turns, with the default kernels
once more for the noise. They become the default for the shapes where this says that they are right and faster.
"""

import argparse
import pathlib
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import torch

from . import bits
from .device import Table, microseconds

FIELDS = ("op", "rank", "rows", "width", "us_default", "us_again", "us_tensor", "of_default")
SHAPES = ((8192, 4096), (16384, 4096), (65536, 4096), (16384, 2048), (32768, 1024))
FLAGS = {"default": (), "tensor": ("-DFASTEDIT_TENSOR",)}
CHECKED, TURNS, CALLS = ((1, 64), (33, 384), (300, 1024), (3000, 4096)), 15, 4


def check(library):
    """How many results are not what emulated_cases.py promises."""
    import emulated_cases as cases

    wrong = 0
    for (rows, width), dtype in ((s, d) for s in CHECKED for d in (torch.bfloat16, torch.float16)):
        form, pair = cases.make_form(rows, width, 4), (dtype, dtype)
        for name, run in (
            ("edit", lambda f, r=rows, w=width, p=pair: cases.check_edit_backward(library, r, w, p, f, without=("coefficient",))),
            ("edit_add_norm", lambda f, r=rows, w=width, p=pair: cases.check_norm_backward(
                library, r, w, p, f, 0, False, without=("coefficient", "weight"))),
        ):  # fmt: skip
            try:
                run(form)
                print(f"right: {name} {rows} x {width} {dtype}", flush=True)
            except Exception as error:
                wrong += 1
                print(f"WRONG: {name} {rows} x {width} {dtype}: {type(error).__name__} {str(error)[:200]}", flush=True)
    for (rows, width), rank in ((s, r) for s in CHECKED for r in (8, 16, 64)):
        try:
            for dtype in (torch.bfloat16, torch.float16):
                cases.check_edit(library, torch.randn(rows, width).to(dtype), cases.make_form(rows, width, rank))
            print(f"right: edit forward {rows} x {width} rank {rank}", flush=True)
        except Exception as error:
            wrong += 1
            print(f"WRONG: edit forward {rows} x {width} rank {rank}: {type(error).__name__} {str(error)[:200]}", flush=True)
    return wrong


def forward(library, rank, rows, width):
    from emulated_cases import make_form

    x, form = torch.randn(rows, width).bfloat16(), make_form(rows, width, rank)
    library.edit(x, form)
    return lambda again=library.again, keep=(x, form): again()


def backward(library, op, rows, width):
    """A call that can be made again and again; what it reads lives as long as it does."""
    from emulated_cases import make_form

    form, z = make_form(rows, width, 4), torch.randn(rows, 4)
    streams = [torch.randn(rows, width).bfloat16() for _ in range(2 if op == "edit" else 4)]
    weight, rstd, needs = torch.rand(width).bfloat16(), torch.rand(rows), [True] * 6 + [False]
    if op == "edit":
        library.edit_backward(*streams, None, form, None, z, needs, torch.bfloat16, (rows, width))
    else:
        library.edit_add_norm_backward(
            *streams, None, weight, None, rstd, form, None, z, False, 0, [*needs, True], (False, False), torch.bfloat16,
            torch.bfloat16, (rows, width),
        )  # fmt: skip
    return lambda again=library.again, keep=(form, z, streams, weight, rstd): again()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="bench/results")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU is here")
    sources = [*bits.KERNEL_SOURCES, bits.ROOT / "tests/cuda_emulator/exports.cpp"]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor() as pool:
        folders = [pathlib.Path(name) / kind for kind in FLAGS]
        for folder in folders:
            folder.mkdir()
        default, tensor = map(bits.on_gpu, pool.map(lambda f: bits.build(f, sources, FLAGS[f.name]), folders))
    table = Table(pathlib.Path(options.out) / "gpu-tensor.csv", FIELDS)
    torch.manual_seed(0)
    with torch.device("cuda"):
        wrong = check(tensor)
        kinds = (("edit", 4), ("edit_add_norm", 4), ("edit forward", 8), ("edit forward", 16), ("edit forward", 64))
        for (op, rank), (rows, width) in ((kind, shape) for shape in SHAPES for kind in kinds):
            libraries = {"default": default, "again": default, "tensor": tensor}
            calls = {
                n: forward(library, rank, rows, width) if op == "edit forward" else backward(library, op, rows, width)
                for n, library in libraries.items()
            }
            times = {n: [] for n in calls}
            for _ in range(TURNS):
                for n, call in calls.items():
                    times[n].append(microseconds(call, CALLS))
            us = {n: statistics.median(t) for n, t in times.items()}
            row = {f"us_{n}": f"{t:.1f}" for n, t in us.items()} | {"of_default": f"{us['tensor'] / us['default']:.3f}"}
            table.write(op=op, rank=rank, rows=rows, width=width, **row)
            print(f"{op} rank {rank} {rows} x {width}: {row['of_default']} of the default kernel's time", flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
