"""Runs kernels of the native module on plain memory; test_instructions.py counts their instructions.

Imports neither torch nor NumPy, so that it starts quickly under valgrind, and starts once: each case is a process forked
from this one, whose number is printed. Arguments follow kernels/abi.h field by field.

    python instruction_counts.py OP DTYPE CALLS [OP DTYPE CALLS ...]
"""

import ctypes
import os
import struct
import sys

from fastedit import _native

ROWS, WIDTH = 16, 1024  # below what wakes a second thread
CODES = {"fp32": 0, "bf16": 1, "fp16": 2}
SIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
FORM = "5P2q2Pq2P"
ADD = f"2q{FORM}2iPqPqPPi0q"
PACKED = {
    "edit": f"2q{FORM}iPqPP", "edit_add": ADD, "edit_add_norm": f"{ADD}if5P", "project": "3qiPqPPP",
    "edit_backward": f"2q{FORM}2iPqPqPq12P", "edit_add_norm_backward": f"2q{FORM}2iPqPqPPqPq5P2i13P",
}  # fmt: skip


def main(op, dtype, calls):
    kept = []

    def memory(size):
        kept.append(ctypes.create_string_buffer(size + 64))
        return (ctypes.addressof(kept[-1]) + 63) // 64 * 64

    def stream():
        return memory(ROWS * WIDTH * SIZE[dtype])

    def parameter(rows=1):
        return memory(4 * WIDTH * rows)

    code, rank = CODES[dtype], 4 if op.endswith("4") or op == "project" else 0
    low_rank = (parameter(rank), memory(4 * rank), parameter(rank)) if rank else (0, 0, 0)
    form = (parameter(), parameter(), *low_rank, rank, 1, 0, 0, 0, 0, 0)  # no slots, coefficient or gate
    add = (ROWS, WIDTH, *form, code, code, stream(), WIDTH, stream(), WIDTH, stream(), 0, 0)
    d_form = (parameter(), parameter(), *low_rank, 0)
    none = (0, 0, 0)  # no order of slots
    z = memory(4 * ROWS * rank) if rank else 0
    arguments = {
        "edit": lambda: (ROWS, WIDTH, *form, code, stream(), WIDTH, stream(), 0),
        "edit_add": lambda: add,
        "edit_add_norm": lambda: (*add, 0, 1e-6, stream(), 0, stream(), 0, 0),
        "project": lambda: (ROWS, WIDTH, rank, code, stream(), WIDTH, low_rank[0], low_rank[1], z),
        "edit_backward": lambda: (
            ROWS, WIDTH, *form, code, code, stream(), WIDTH, stream(), WIDTH, 0, 0, 0, z, stream(), *d_form, *none,
        ),
        "edit_add_norm_backward": lambda: (
            ROWS, WIDTH, *form, code, code, stream(), WIDTH, stream(), WIDTH, stream(), stream(), WIDTH, 0, 0, stream(),
            0, memory(4 * ROWS), 0, z, 0, 0, stream(), stream(), *d_form, 0, 0, *none,
        ),
    }[op.rstrip("4")]()  # fmt: skip
    fields = struct.pack(PACKED[op.rstrip("4")], *arguments)
    for _ in range(calls):
        _native.raw(op.rstrip("4"), fields)


if __name__ == "__main__":
    for op, dtype, calls in zip(*[iter(sys.argv[1:])] * 3, strict=True):
        child = os.fork()
        if child == 0:
            main(op, dtype, int(calls))
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"{op} {dtype} failed")
        print(child)
