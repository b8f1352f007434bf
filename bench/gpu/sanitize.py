"""Calls for compute-sanitizer, through CuPy and the array face: no torch, so that loading it is not what takes the time.

    compute-sanitizer --tool memcheck python -m bench.gpu.sanitize

Ranks, a norm, slots and a gate, at widths that vectors divide and that they do not. In a rehearsal the arrays are NumPy's.
"""

import os

import numpy as np


def library():
    if os.environ.get("FASTEDIT_GPU_REHEARSAL") == "1":
        return np
    import cupy

    return cupy


def form(xp, width, rank, slots=0):
    lead = (slots,) if slots else ()

    def random(*shape):
        return xp.asarray(np.random.default_rng(0).standard_normal((*lead, *shape)), dtype=xp.float32)

    made = {"scale": random(width), "bias": random(width)}
    if rank:
        made |= {"read": random(rank, width), "offset": random(rank), "write": random(rank, width)}
    return made


def main():
    from fastedit import arrays

    xp, calls = library(), 0
    for width, rows in ((2048, 9), (1001, 5)):
        x = xp.asarray(np.random.default_rng(1).standard_normal((rows, width)), dtype=xp.float32)
        residual, weight = x[::-1].copy(), xp.ones(width, dtype=xp.float32)
        for rank in (0, 4):
            for half in (xp.float32, xp.float16):
                a, b, w = x.astype(half), residual.astype(half), weight.astype(half)
                arrays.edit(a, **form(xp, width, rank))
                arrays.edit_add(a, b, **form(xp, width, rank))
                arrays.edit_add_norm(a, b, w, **form(xp, width, rank), eps=1e-6)
                calls += 3
        slot = xp.asarray([-1, 0, 1, 2, 0][:rows] + [1] * (rows - 5), dtype=xp.int32)
        arrays.edit(x, **form(xp, width, 2, slots=3), slot=slot)
        calls += 1
    if xp is not np:
        xp.cuda.get_current_stream().synchronize()
    print(f"{calls} calls")


if __name__ == "__main__":
    main()
