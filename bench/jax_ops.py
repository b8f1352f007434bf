"""fastedit.jax against the same expression in plain jnp, both under jax.jit, interleaved; rows as in bench.kernels.

    python -m bench.jax_ops [--out bench/results] [--rows 512] [--width 4096]

Modes: forward; gradient, which is forward and backward together, since that is what XLA compiles. `copy` is NumPy's
copy of the bytes that the forward must move. On a CPU only the ratios mean anything beyond the machine.
"""

import argparse
import csv
import pathlib
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from fastedit import jax as fej
from fastedit.verifying.timing import interleave, quantiles, ratio

from .kernels.cases import EPS, Case
from .kernels.study import FIELDS as STUDIED
from .machine import commit, machine

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}
FIELDS = ["jax" if name == "torch" else name for name in STUDIED]


def plain_edit(h, scale, bias):
    return (scale * h + bias).astype(h.dtype)


def plain_norm(r, weight):
    f = r.astype(jnp.float32)
    return weight * (f * jax.lax.rsqrt((f * f).mean(-1, keepdims=True) + EPS)).astype(r.dtype)


def plain_edit_add_norm(x, residual, weight, scale, bias):
    total = residual + plain_edit(x, scale, bias)
    return total, plain_norm(total, weight)


OPS = {
    "edit": (lambda t: fej.edit(t["x"], *t["form"]), lambda t: plain_edit(t["x"], *t["form"])),
    "edit_add": (
        lambda t: fej.edit_add(t["x"], t["residual"], *t["form"]),
        lambda t: t["residual"] + plain_edit(t["x"], *t["form"]),
    ),
    "edit_add_norm": (
        lambda t: fej.edit_add_norm(t["x"], t["residual"], t["weight"], *t["form"], eps=EPS),
        lambda t: plain_edit_add_norm(t["x"], t["residual"], t["weight"], *t["form"]),
    ),
}


def compiled(function, mode, inputs):
    """A function of no arguments that runs the compiled op and waits for it."""
    if mode == "gradient":
        def run(inputs):
            outputs, pull = jax.vjp(function, inputs)
            return pull(outputs)
    else:
        run = function
    run = jax.jit(run)
    return lambda: jax.block_until_ready(run(inputs))


def measure(case, blocks, rounds):
    """CSV rows of one case."""
    random, dtype = np.random.default_rng(0), DTYPES[case.dtype]
    shape, width = (case.rows, case.width), (case.width,)
    x, residual = (jnp.asarray(random.standard_normal(shape), dtype) for _ in range(2))
    scale, bias = (jnp.asarray(random.standard_normal(width), jnp.float32) for _ in range(2))
    inputs = {"x": x, "residual": residual, "weight": jnp.ones(width, dtype), "form": (scale, bias)}
    source = np.ones(case.bytes() // 2, np.uint8)
    target = np.empty_like(source)
    ours, plain = (compiled(function, case.mode, inputs) for function in OPS[case.op])
    medians = interleave(
        {"fastedit": ours, "jnp": plain, "copy": lambda: np.copyto(target, source)}, blocks=blocks, rounds=rounds
    )
    copy = statistics.median(medians["copy"])
    for name, times in medians.items():
        p20, p50, p80 = quantiles(times)
        against, half = ratio(medians, name, "fastedit")
        yield {
            "op": case.op, "backend": jax.default_backend() if name == "fastedit" else name, "mode": case.mode,
            "dtype": case.dtype, "rows": case.rows, "width": case.width, "rank": case.rank, "slots": case.slots,
            "us_p20": f"{p20 * 1e6:.2f}", "us_p50": f"{p50 * 1e6:.2f}", "us_p80": f"{p80 * 1e6:.2f}",
            "ratio": f"{against:.3f}", "ratio_95": f"{half:.3f}", "bytes": case.bytes(),
            "gb_s": f"{case.bytes() / p50 / 1e9:.1f}", "share_of_copy": f"{copy / p50:.3f}",
        }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="bench/results")
    parser.add_argument("--op", choices=OPS, action="append", help="may be given more than once; default: all")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    path = pathlib.Path(options.out) / f"jax-{jax.default_backend()}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"machine": machine(), "jax": jax.__version__, "commit": commit()}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for op in options.op or OPS:
            for mode in ("forward", "gradient"):
                for dtype in DTYPES:
                    case = Case(op, mode, dtype, options.rows, options.width)
                    for row in measure(case, options.blocks, options.rounds):
                        writer.writerow(row | about)
                    file.flush()
    print(path)


if __name__ == "__main__":
    main()
