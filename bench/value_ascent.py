"""RE-Control's ascent against the autograd loop it replaces, and against the same steps in plain PyTorch; interleaved.

    python -m bench.value_ascent [--rows 1 8] [--width 4096] [--units 4096] [--steps 30] [--step-size 0.5]

Writes value-ascent-<device>.csv: everything is in the time but the Gram matrix, which a frozen value net makes once
(`gram_s`). `error` and `eager_error` are the largest of h' against the loop in float64, `flips` the share of units that
change sign in a step, `fp64` the largest relative difference of the float64 path from that loop.
"""

import argparse
import csv
import pathlib
import time

import torch

import fastedit
from fastedit import ops
from fastedit.dispatch import select

from .machine import about
from .timing import interleave, quantiles, ratio

FIELDS = (
    "op", "variant", "backend", "rows", "width", "units", "steps", "step_size", "us_p20", "us_p50", "us_p80", "times_faster",
    "times_faster_95", "error", "eager_error", "fp64", "flips", "gram_s", "machine", "torch", "commit",
)  # fmt: skip


def autograd_loop(hidden, net, steps, step_size):
    """u ← u + a ∇V(h + u), as RE-Control does it."""
    u = torch.zeros_like(hidden)
    for _ in range(steps):
        moved = (hidden + u).requires_grad_()
        (gradient,) = torch.autograd.grad(net(moved).sum(), moved)
        u = u + step_size * gradient
    return hidden + u


@torch.no_grad()
def plain_steps(hidden, net, steps, step_size):
    """The same gradient written out, without autograd: two products a step."""
    weight, bias, _, _, head = net.tensors()
    h = hidden
    for _ in range(steps):
        h = h + step_size * ((h @ weight.T + bias > 0) * head) @ weight
    return h


@torch.no_grad()
def flip_share(hidden, net, steps, step_size):
    """Units that change sign, of all, in a step."""
    signs = []
    for step in range(steps):
        signs.append(ops.value_ascent(hidden, net, step, step_size) @ net.weight.T + net.bias > 0)
    return sum((a != b).double().mean().item() for a, b in zip(signs, signs[1:], strict=False)) / max(steps - 1, 1)


def make(rows, width, units, device):
    """A frozen value net, its output layer as large as a trained one's gradient makes it, and unit-size hidden states."""
    torch.manual_seed(0)
    net = fastedit.ValueNet(width, units, device=device).requires_grad_(False)
    return net, torch.randn(rows, width, device=device)


def largest(a, b):
    return (a.double() - b.double()).abs().max().item()


def measure(rows, width, units, steps, step_size, device, blocks, rounds):
    net, hidden = make(rows, width, units, device)
    start = time.perf_counter()
    net.gram()
    gram_s = time.perf_counter() - start
    arguments = (hidden, net, steps, step_size)
    variants = {
        "autograd loop": lambda: autograd_loop(*arguments),
        "plain steps": lambda: plain_steps(*arguments),
        "fastedit": lambda: ops.value_ascent(*arguments),
    }
    wide = (hidden.double(), *arguments[1:])
    exact = autograd_loop(*wide)
    fp64 = largest(ops.value_ascent(*wide), exact) / exact.abs().max().item()
    errors = {name: largest(function(), exact) for name, function in variants.items()}
    flips = flip_share(*arguments)
    medians = interleave(variants, blocks=blocks, rounds=rounds, warmup=1)
    for name, times in medians.items():
        p20, p50, p80 = (f"{t * 1e6:.1f}" for t in quantiles(times))
        slower, half = ratio(medians, "autograd loop", name)
        yield {
            "op": "value_ascent", "variant": name, "backend": select(device, torch.float32).__name__ if name == "fastedit" else "",
            "rows": rows, "width": width, "units": units, "steps": steps, "step_size": step_size, "us_p20": p20, "us_p50": p50,
            "us_p80": p80, "times_faster": f"{slower:.2f}", "times_faster_95": f"{half:.2f}", "error": f"{errors[name]:.3g}",
            "eager_error": f"{errors['autograd loop']:.3g}", "fp64": f"{fp64:.3g}", "flips": f"{flips:.5f}",
            "gram_s": f"{gram_s:.2f}",
        }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="bench/results")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--units", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--step-size", type=float, default=0.5)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = pathlib.Path(options.out) / f"value-ascent-{device}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    where = about()
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for rows in options.rows:
            sizes = (rows, options.width, options.units, options.steps, options.step_size)
            for row in measure(*sizes, device, options.blocks, options.rounds):
                writer.writerow(row | where)
                print(f"{row['rows']:>3} rows  {row['variant']:<14}{row['us_p50']:>12} µs  {row['times_faster']:>6} times faster")
    print(path)


if __name__ == "__main__":
    main()
