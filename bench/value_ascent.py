"""RE-Control's ascent against the autograd loop it replaces, and against the same steps in plain PyTorch; interleaved.

    python -m bench.value_ascent [--rows 1 8] [--width 4096] [--units 4096 [4096]] [--steps 30] [--step-size 0.5] [--gain 1]

Writes value-ascent-<device>.csv: everything is in the time but the Gram matrix, which a frozen value net makes once
(`gram_s`). `error` and `eager_error` are the largest of h' against the loop in float64, `flips` the share of units that
change sign in a step, `fp64` the largest relative difference of the float64 path from that loop.
"""

import argparse
import csv
import itertools
import pathlib
import time

import torch
from fastedit.kernels.reference.value_ascent import gradient_at

import fastedit
from fastedit import ops
from fastedit.dispatch import select

from .machine import about
from .timing import interleave, quantiles, ratio

FIELDS = (
    "op", "variant", "backend", "rows", "width", "units", "steps", "step_size", "us_p20", "us_p50", "us_p80", "times_faster",
    "times_faster_95", "error", "eager_error", "fp64", "flips", "gain", "gram_s", "machine", "torch", "commit",
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
    weight, bias, weight2, bias2, head = net.tensors()
    h = hidden
    for _ in range(steps):
        h = h + step_size * gradient_at(h @ weight.T + bias, weight2, bias2, head) @ weight
    return h


@torch.no_grad()
def flip_share(hidden, net, steps, step_size):
    """Units that change sign, of all, in a step."""
    signs = []
    for step in range(steps):
        signs.append(ops.value_ascent(hidden, net, step, step_size) @ net.weight.T + net.bias > 0)
    changed = [(a != b).double().mean().item() for a, b in itertools.pairwise(signs)]
    return sum(changed) / max(len(changed), 1)


def make(rows, width, units, gain, device):
    """A frozen value net whose gradient is `gain` times that of a fresh one, and hidden states of unit size."""
    torch.manual_seed(0)
    net = fastedit.ValueNet(width, units, device=device).requires_grad_(False)
    net.head.mul_(gain)
    return net, torch.randn(rows, width, device=device)


def largest(a, b):
    return (a.double() - b.double()).abs().max().item()


def measure(rows, width, units, steps, step_size, gain, device, blocks, rounds):
    net, hidden = make(rows, width, units, gain, device)
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
    backend = select(device, torch.float32).__name__
    medians = interleave(variants, blocks=blocks, rounds=rounds, warmup=1)
    for name, times in medians.items():
        p20, p50, p80 = (f"{t * 1e6:.1f}" for t in quantiles(times))
        slower, half = ratio(medians, "autograd loop", name)
        yield {
            "op": "value_ascent", "variant": name, "backend": backend if name == "fastedit" else "",
            "rows": rows, "width": width, "units": "x".join(map(str, units)), "gain": gain,
            "steps": steps, "step_size": step_size, "us_p20": p20, "us_p50": p50,
            "us_p80": p80, "times_faster": f"{slower:.2f}", "times_faster_95": f"{half:.2f}", "error": f"{errors[name]:.3g}",
            "eager_error": f"{errors['autograd loop']:.3g}", "fp64": f"{fp64:.3g}", "flips": f"{flips:.5f}",
            "gram_s": f"{gram_s:.2f}",
        }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="bench/results")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--units", type=int, nargs="+", default=[4096], help="of one hidden layer, or of two")
    parser.add_argument("--gain", type=float, default=1.0, help="of the value net's gradient")
    parser.add_argument("--append", action="store_true", help="to the CSV that is there")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--step-size", type=float, default=0.5)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = pathlib.Path(options.out) / f"value-ascent-{device}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    where = about()
    with path.open("a" if options.append else "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if not options.append:
            writer.writeheader()
        for rows in options.rows:
            sizes = (rows, options.width, tuple(options.units), options.steps, options.step_size, options.gain)
            for row in measure(*sizes, device, options.blocks, options.rounds):
                writer.writerow(row | where)
                print(f"{row['rows']:>3} rows  {row['variant']:<14}{row['us_p50']:>12} µs  {row['times_faster']:>6} times faster")
    print(path)


if __name__ == "__main__":
    main()
