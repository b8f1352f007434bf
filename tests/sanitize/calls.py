"""Random calls of every native op, forward and backward, for a build under AddressSanitizer and UBSan (make sanitize).

    python tests/sanitize/calls.py CALLS SECONDS     CALLS on one thread for all instruction sets, then two threads

Refuses to run on a module without sanitizers, whose calls would show nothing.

Shapes are small and odd, arrays begin at odd places of their memory, and each has an end of its own, so that a read or
write outside of any of them is seen. Results are only asked to be finite. Imports NumPy alone.
"""

import sys
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from fastedit import _native, arrays

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)
SETS = ("baseline", "avx2", "avx512")


class Case:
    """The arguments of one random call."""

    def __init__(self, random):
        self.random, pick = random, random.integers
        self.rows, self.width = int(pick(0, 40)) * int(pick(1, 20)), int(pick(1, 200))
        self.rank = int(pick(1, 9)) if pick(2) else 0
        self.slots = int(pick(1, 4)) if pick(3) == 0 else 0
        self.dtype = DTYPES[pick(3)]

    def array(self, *shape, dtype=np.float32):
        return (self.random.random(shape, np.float32) - 0.5).astype(dtype)

    def stream(self):
        apart = int(self.random.integers(0, 9))
        wide = self.array(self.rows, self.width + apart, dtype=self.dtype)
        return wide[:, apart:]

    def some(self, *shape):
        return self.array(*shape) if self.random.integers(4) else None

    def form(self):
        lead = (self.slots,) if self.slots else ()
        form = [self.array(*lead, self.width) if self.slots else self.some(self.width), self.some(*lead, self.width)]
        if self.rank:
            inner = (*lead, self.rank, self.width)
            form += [self.array(*inner), self.some(*lead, self.rank), self.array(*inner)]
        else:
            form += [None] * 3
        slot = self.random.integers(-1, self.slots, self.rows).astype(np.int32) if self.slots else None
        strength = (None, 0.5, self.array(1), self.array(self.rows))[self.random.integers(4)]
        return [*form, slot, strength]

    def gate(self):
        if self.random.integers(3):
            return {}
        lead = (self.slots,) if self.slots else ()
        return {"gate": self.array(*lead, self.width), "rule": abs(self.array(*lead, 3))}


def forward(case):
    form, gate = case.form(), case.gate()
    named = dict(zip(("scale", "bias", "read", "offset", "write", "slot", "strength"), form, strict=True)) | gate
    yield from np.atleast_1d(arrays.edit(case.stream(), **named, return_projection=bool(case.rank))) if not case.rank else (
        arrays.edit(case.stream(), **named, return_projection=True)
    )
    on = ("x", "sum")[case.random.integers(2)]
    yield arrays.edit_add(case.stream(), case.stream(), **named, on=on)
    kind = ("rms", "gemma", "layer")[case.random.integers(3)]
    yield from arrays.edit_add_norm(
        case.stream(), case.stream(), case.array(case.width, dtype=case.dtype), **named, kind=kind, on=on
    )
    yield arrays.project(case.stream(), case.array(case.rank or 1, case.width))
    group = case.random.integers(-1, 3, case.rows).astype(np.int32)
    yield from arrays.moments(case.stream(), group, 3)
    yield from arrays.moments(case.stream())
    units, units2 = (int(case.random.integers(1, 30)) for _ in range(2))
    deep = case.random.integers(2)
    net = {"weight2": case.array(units2, units), "bias2": case.array(units2)} if deep else {}
    yield arrays.value_ascent(
        case.stream(), case.array(units, case.width), case.array(units), case.array(units2 if deep else units),
        steps=int(case.random.integers(0, 5)), step_size=0.1, **net,
    )  # fmt: skip


def backward(case):
    form = case.form()
    wanted = [bool(case.random.integers(3)) for _ in range(7)]
    needs = (wanted[0], *(w and p is not None for w, p in zip(wanted[1:6], form[:5], strict=True)), wanted[6])
    form[6] = None if isinstance(form[6], float) else form[6]
    needs = (*needs[:6], needs[6] and form[6] is not None)
    z, grad_z = (case.array(case.rows, case.rank) if case.rank else None for _ in range(2))
    x, residual = case.stream(), case.stream()
    yield from _native.edit_backward(
        case.stream(), x, residual if case.random.integers(2) else None, *form, grad_z, z, needs, None
    )
    kind, on_sum = int(case.random.integers(3)), bool(case.random.integers(2))
    mean, rstd = case.array(case.rows), abs(case.array(case.rows)) + 1
    yield from _native.edit_add_norm_backward(
        case.stream() if case.random.integers(2) else None, case.stream(), np.ascontiguousarray(case.stream()), x, residual,
        case.array(case.width, dtype=case.dtype), mean, rstd, *form, grad_z, z, on_sum, kind,
        (*needs, bool(case.random.integers(2))), (bool(case.random.integers(2)), kind == 2), None, None,
    )  # fmt: skip
    rank = case.rank or 1
    yield from _native.project_backward(
        case.array(case.rows, rank), case.stream().astype(np.float32), case.array(rank, case.width),
        tuple(bool(case.random.integers(2)) for _ in range(3)), None,
    )  # fmt: skip


def check(seed):
    """The calls of one case; their number."""
    case = Case(np.random.default_rng(seed))
    results = [r for r in (*forward(case), *backward(case)) if r is not None]
    if not all(np.isfinite(np.asarray(r, np.float64)).all() for r in results):
        raise AssertionError(f"case {seed}: a result is not finite")
    return 11


def crowd(seconds):
    """Two threads at once, each with cases of its own."""
    end, failed = time.monotonic() + seconds, []

    def work(first):
        seed = first
        while time.monotonic() < end and not failed:
            try:
                check(seed)
            except BaseException as error:
                failed.append(error)
            seed += 2

    threads = [threading.Thread(target=work, args=(first,)) for first in (10**9, 10**9 + 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def main(calls, seconds):
    if b"__asan_init" not in Path(_native.__file__).read_bytes():
        raise SystemExit(f"{_native.__file__} was built without AddressSanitizer: see make sanitize")
    usual, done, seed = _native.instruction_set(), 0, 0
    available = SETS[: SETS.index(usual) + 1]
    for name in available:
        _native.set_instruction_set(name)
        until = done + calls // len(available)
        while done < until:
            done, seed = done + check(seed), seed + 1
        print(f"{done} calls, the last under {name}", flush=True)
    crowd(seconds)
    print(f"two threads for {seconds} s: clean", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
