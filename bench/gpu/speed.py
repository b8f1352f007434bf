"""Copy, add and our ops, timed with events over rotating buffers of random numbers.

    python -m bench.gpu.speed --out bench/results --seconds 55 [--once]

Writes gpu-speed.csv. A variant's buffers are together several times the last cache, so that no call finds its rows there.
Few rows are many calls in one CUDA graph. `copy` moves as many bytes as the op it is measured beside, in the same turns.
--once runs five kernels once each at the central shape, for a profiler.
"""

import argparse
import itertools
import pathlib
import statistics
import time

import torch

from .device import NAME, REHEARSAL, Table, cache_bytes, captured, microseconds, require, synchronize

FIELDS = (
    "op",
    "mode",
    "rows",
    "width",
    "rank",
    "slots",
    "graph",
    "us_p20",
    "us_p50",
    "us_p80",
    "bytes",
    "gb_s",
    "of_copy",
)
ROWS, WIDTHS, RANKS, SLOTS = (8192, 64, 1), (4096, 2048, 8192), (0, 4, 16), 256
if REHEARSAL:
    ROWS, WIDTHS, SLOTS = (32, 1), (128, 64), 4
STREAMS = {("edit", "forward"): 2, ("edit_add", "forward"): 3, ("edit_add_norm", "forward"): 4, ("edit", "backward"): 3,
           ("edit_add_norm", "backward"): 6}  # fmt: skip
TURNS = 3 if REHEARSAL else 15


def form_of(width, rank, slots=0):
    lead = (slots,) if slots else ()

    def random(*shape):
        return torch.randn(*lead, *shape, device=NAME)

    form = {"scale": 1 + 0.1 * random(width), "bias": 0.1 * random(width)}
    if rank:
        form |= {
            "read": random(rank, width) / width**0.5,
            "offset": random(rank),
            "write": random(rank, width) / rank**0.5,
        }
    return form


class Rotating:
    """Calls of function(i) in turn over `count` sets of buffers."""

    def __init__(self, function, count):
        self.function, self.turns = function, itertools.cycle(range(count))

    def __call__(self):
        return self.function(next(self.turns))


def sets_for(streams, size):
    """Sets of buffers that are together four times the last cache, at most 64."""
    return min(64, max(2, -(-4 * cache_bytes() // (streams * size))))


def copies(size, streams):
    """A copy of as many bytes as `streams` streams of `size` bytes, half of them read."""
    count, length = sets_for(streams, size), max(1, streams * size // 4)
    pairs = [
        (torch.randn(length, device=NAME).bfloat16(), torch.empty(length, dtype=torch.bfloat16, device=NAME))
        for _ in range(count)
    ]
    return Rotating(lambda i: pairs[i][1].copy_(pairs[i][0]), count)


def variant(op, mode, rows, width, rank, slots=0):
    """A call of the op over its own rotating rows; a backward is the whole of torch.autograd.grad."""
    from fastedit import ops

    count = sets_for(STREAMS[op, mode], rows * width * 2)
    sets = [[torch.randn(rows, width, device=NAME).bfloat16() for _ in range(2)] for _ in range(count)]
    form, weight = form_of(width, rank, slots), torch.ones(width, device=NAME).bfloat16()
    if slots:
        form["slot"] = (torch.arange(rows, device=NAME) % slots).int()

    def call(x, residual, **form):
        if op == "edit":
            return ops.edit(x, **form)
        return ops.edit_add(x, residual, **form) if op == "edit_add" else ops.edit_add_norm(x, residual, weight, **form)

    if mode == "forward":

        def forward(i):
            with torch.no_grad():
                return call(*sets[i], **form)

        return Rotating(forward, count)
    parameters = [p.requires_grad_() for p in form.values() if p.is_floating_point()]
    graphs = []
    for x, residual in sets:
        inputs = [x.requires_grad_(), *([residual.requires_grad_()] if op == "edit_add_norm" else []), *parameters]
        outputs = call(x, residual, **form)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        graphs.append((outputs, inputs, [torch.randn_like(o) for o in outputs]))
    return Rotating(lambda i: torch.autograd.grad(*graphs[i], retain_graph=True), count)


def added(rows, width):
    count = sets_for(3, rows * width * 2)
    sets = [[torch.randn(rows, width, device=NAME).bfloat16() for _ in range(2)] for _ in range(count)]
    return Rotating(lambda i: sets[i][0] + sets[i][1], count)


def wanted():
    """(op, mode, rows, width, rank, slots), the telling ones first."""
    for rows, width in itertools.product(ROWS, WIDTHS):
        for op, rank in itertools.product(("edit_add", "edit_add_norm", "edit"), RANKS):
            yield op, "forward", rows, width, rank, 0
        yield "edit_add", "forward", rows, width, 0, SLOTS
        for op, rank in (("edit_add_norm", 0), ("edit", 0), ("edit", 4)):
            if rows == ROWS[0]:  # fewer rows are the host's time
                yield op, "backward", rows, width, rank, 0


def timed(functions, few):
    """{name: [µs a call of each turn]}, the functions taking turns; `few` rows as 20 calls in a CUDA graph."""
    calls = 20 if few else 4
    for function in functions.values():
        for _ in range(3):
            function()
    synchronize()
    if few:
        functions = {n: captured(lambda f=f: [f() for _ in range(calls)]) for n, f in functions.items()}
    times = {name: [] for name in functions}
    for _ in range(TURNS):
        for name, function in functions.items():
            times[name].append(microseconds(function, 1 if few else calls) / (calls if few else 1))
    return times


def write_timing(table, times, about, size, copy):
    p20, p50, p80 = (statistics.quantiles(times, n=10)[i] for i in (1, 4, 7))
    table.write(**about, us_p20=f"{p20:.2f}", us_p50=f"{p50:.2f}", us_p80=f"{p80:.2f}", bytes=size,
                gb_s=f"{size / p50 / 1e3:.0f}", of_copy=f"{copy / p50:.3f}")  # fmt: skip
    print(*about.values(), f"{p50:.2f} us  {size / p50 / 1e3:.0f} GB/s  {copy / p50:.3f} of the copy", flush=True)


def measure(table, op, mode, rows, width, rank, slots):
    few, streams = rows < 1024 and mode == "forward", STREAMS[op, mode]
    size = streams * rows * width * 2
    functions = {"copy": copies(rows * width * 2, streams), op: variant(op, mode, rows, width, rank, slots)}
    if op == "edit_add" and not rank and not slots:
        functions["add"] = added(rows, width)
    times = timed(functions, few)
    copy = statistics.median(times["copy"])
    for name, found in times.items():
        about = {
            "op": name,
            "mode": mode,
            "rows": rows,
            "width": width,
            "rank": rank,
            "slots": slots,
            "graph": int(few),
        }
        write_timing(table, found, about, size, copy)


def once():
    """Five kernels, each launched once after a first call that loads it."""
    rows, width = ROWS[0], WIDTHS[0]
    for case in (("edit_add", "forward", 0), ("edit_add_norm", "forward", 0), ("edit_add", "forward", 4),
                 ("edit", "backward", 0), ("edit_add_norm", "backward", 0)):  # fmt: skip
        variant(case[0], case[1], rows, width, case[2])()
        synchronize()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="bench/results")
    parser.add_argument("--seconds", type=float, default=55)
    parser.add_argument("--once", action="store_true", help="five kernels, for a profiler")
    options = parser.parse_args()
    require()
    torch.manual_seed(0)
    if options.once:
        return once()
    table, begin, cases = (
        Table(pathlib.Path(options.out) / "gpu-speed.csv", FIELDS),
        time.perf_counter(),
        list(wanted()),
    )
    failed = 0
    for done, case in enumerate(cases):
        if time.perf_counter() - begin > options.seconds:
            print(f"the time is over: {len(cases) - done} of {len(cases)} cases are left out")
            break
        try:
            measure(table, *case)
        except Exception as error:
            failed += 1
            print(*case, f"{type(error).__name__}: {error}", flush=True)
    if failed:
        raise SystemExit(f"{failed} cases failed")


if __name__ == "__main__":
    main()
