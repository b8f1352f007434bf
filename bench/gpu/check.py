"""Every op and backward once at three shapes, against float64 on the same device.

    python -m bench.gpu.check --out bench/results [--backend triton --quick]

Writes gpu-check.csv (gpu-check-<backend>.csv): the largest error and what the promise allows, twice that of the same-dtype
eager expression and one unit in the last place. A failing case is a row like any other; the exit code says that there was
one. Memory that a kernel forgets to write is NaN here.
"""

import argparse
import functools
import os
import pathlib
import sys
import time

import torch

from .device import NAME, Table, require

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parents[2] / "tests")]
FIELDS = ("op", "backend", "dtype", "rows", "width", "rank", "of", "error", "allowed", "verdict")
SHAPES = ((257, 4096), (64, 1024), (33, 1000))


def cases(quick):
    for rows, width in SHAPES[: 1 if quick else 3]:
        for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float32):
            for rank in (0, 4) if quick else (0, 4, 16):
                yield rows, width, dtype, rank


def promising(run, inputs, exact_of, grads):
    """{name: (found, float64, eager)} of outputs and gradients; the same function runs in all three."""

    def through(function, cast):
        given = {n: cast(t).detach().requires_grad_() for n, t in inputs.items()}
        outputs = function(**given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        cotangents = [g.to(o.dtype) for g, o in zip(grads, outputs, strict=False)]
        found = torch.autograd.grad(outputs, list(given.values()), cotangents)
        named = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
        return named | {f"d_{n}": g for n, g in zip(given, found, strict=True)}

    found, exact, eager = (
        through(run, lambda t: t),
        through(exact_of, torch.Tensor.double),
        through(exact_of, lambda t: t),
    )
    return {name: (found[name], exact[name], eager[name]) for name in found}


def functions(form, dtype, stored):
    """{op: (its own call, the expression it stands for)}."""
    from oracle import FORM, eager_edit, eager_norm

    from fastedit import ops

    whole = dict.fromkeys(FORM)

    def rounded(t):
        return t if t.dtype == torch.float64 else t.to(dtype)

    def edit(x, **form):
        return rounded(eager_edit(x, whole | form))

    def add(x, residual, **form):
        return rounded(residual + eager_edit(x, whole | form))

    def add_norm(x, residual, weight, **form):
        r = add(x, residual, **form)  # the norm is that of the residual' that is stored
        return r, eager_norm(r + (stored().to(r.dtype) - r).detach(), weight, None, "rms", 1e-6)

    return {
        "edit": (ops.edit, edit),
        "edit_add": (ops.edit_add, add),
        "edit_add_norm": (functools.partial(ops.edit_add_norm, eps=1e-6), add_norm),
    }


def check_case(table, backend, rows, width, dtype, rank):
    from oracle import make_form, ulp

    from fastedit import ops

    streams = {n: torch.randn(rows, width, device=NAME).to(dtype) for n in ("x", "residual")}
    form = {n: p.to(NAME) for n, p in make_form(width, rank).items() if p is not None}
    weight = (1 + 0.2 * torch.randn(width, device=NAME)).to(dtype)
    grads = [torch.randn(rows, width, device=NAME).to(dtype) for _ in range(2)]
    stored = functools.cache(lambda: ops.edit_add(*streams.values(), **form))
    bad = 0
    for op, (run, expression) in functions(form, dtype, stored).items():
        inputs = (
            streams | {"weight": weight}
            if op == "edit_add_norm"
            else streams
            if op == "edit_add"
            else {"x": streams["x"]}
        )
        about = {"op": op, "backend": backend, "dtype": str(dtype)[6:], "rows": rows, "width": width, "rank": rank}
        run = (lambda x, **form: ops.edit(x, **form)) if op == "edit" else run
        try:
            results = promising(run, inputs | form, expression, grads)
        except Exception as error:
            table.write(**about, verdict=f"{type(error).__name__}: {error}"[:200])
            bad += 1
            continue
        for name, (found, exact, eager) in results.items():
            error = float((found.double() - exact).abs().max())
            allowed = 2 * float((eager.double() - exact).abs().max()) + ulp(exact, found.dtype)
            good = error <= allowed  # false for NaN
            bad += not good
            table.write(
                **about, of=name, error=f"{error:.3e}", allowed=f"{allowed:.3e}", verdict="ok" if good else "WRONG"
            )
    return bad


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="bench/results")
    parser.add_argument("--backend", help="force one")
    parser.add_argument("--quick", action="store_true", help="one shape in bf16, ranks 0 and 4")
    options = parser.parse_args()
    require()
    if options.backend:
        os.environ["FASTEDIT_BACKEND"] = options.backend
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    from fastedit import dispatch

    backend = dispatch.select(NAME, torch.bfloat16).__name__
    suffix = f"-{options.backend}" if options.backend else ""
    table = Table(pathlib.Path(options.out) / f"gpu-check{suffix}.csv", FIELDS)
    bad, begin = 0, time.perf_counter()
    for case in cases(options.quick):
        wrong = check_case(table, backend, *case)
        bad += wrong
        print(
            *case,
            f"{backend}: {wrong} wrong" if wrong else f"{backend}: right",
            f"{time.perf_counter() - begin:.1f} s",
            flush=True,
        )
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
