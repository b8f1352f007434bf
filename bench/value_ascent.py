"""RE-Control's ascent against the autograd loop it replaces, and against the same steps in plain PyTorch; interleaved.

    python -m bench.value_ascent [--rows 1 8] [--width 4096] [--units 4096 [4096]] [--steps 30] [--step-size 0.5] [--gain 1]

Writes value-ascent-<device>.csv: everything is in the time but the Gram matrix, which a frozen value net makes once
(`gram_s`). `error` and `eager_error` are the largest of h' against the loop in float64, `flips` the share of units that
change sign in a step, `fp64` the largest relative difference of the float64 path from that loop.
"""

import itertools
import time

import torch
from fastedit.kernels.reference.value_ascent import gradient_at

import fastedit
from fastedit import ops
from fastedit.dispatch import select
from fastedit.verifying.timing import interleave, ratio

from . import by_rows

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


def measure(rows, options, device):
    net, hidden = make(rows, options.width, options.units, options.gain, device)
    start = time.perf_counter()
    net.gram()
    gram_s = time.perf_counter() - start
    arguments = (hidden, net, options.steps, options.step_size)
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
    medians = interleave(variants, blocks=options.blocks, rounds=options.rounds, warmup=1)
    for name, times in medians.items():
        slower, half = ratio(medians, "autograd loop", name)
        yield {
            "op": "value_ascent", "variant": name, "backend": backend if name == "fastedit" else "",
            "rows": rows, "width": options.width, "units": "x".join(map(str, options.units)), "gain": options.gain,
            "steps": options.steps, "step_size": options.step_size, **by_rows.microseconds(times),
            "times_faster": f"{slower:.2f}", "times_faster_95": f"{half:.2f}", "error": f"{errors[name]:.3g}",
            "eager_error": f"{errors['autograd loop']:.3g}", "fp64": f"{fp64:.3g}", "flips": f"{flips:.5f}",
            "gram_s": f"{gram_s:.2f}",
        }  # fmt: skip


def main():
    parser = by_rows.parser(__doc__, rounds=3)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--units", type=int, nargs="+", default=[4096], help="of one hidden layer, or of two")
    parser.add_argument("--gain", type=float, default=1.0, help="of the value net's gradient")
    line = lambda row: f"{row['times_faster']:>6} times faster"  # noqa: E731
    by_rows.write("value-ascent", FIELDS, parser.parse_args(), measure, line)


if __name__ == "__main__":
    main()
