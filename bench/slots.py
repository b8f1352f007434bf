"""Issue slots: how many instructions a hot loop issues for an element, against how many its bytes leave time for.

    python -m bench.slots [--out bench/results]

A multiprocessor issues four instructions of 32 threads a clock. While memory moves one element's bytes, the chip can
issue so many an element; a loop that needs more is bound by them and not by its bytes. Counted in the machine code of
sm_90: every instruction of the loops that a tile of rows runs through, also those that a branch skips (an upper bound),
times the trips that the rank and the width make. Needs a checkout, nvcc and cuobjdump (bench.static).
"""

import argparse
import csv
import pathlib
import re
import sys
import tempfile
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests")]

MULTIPROCESSORS, CLOCK_GHZ, LANES = 132, 1.755, 128
COPY_TB_S = {"H100": 3.0, "H200": 4.3}  # copies as they have been measured on such cards
WIDTH = 4096
FIELDS = (
    "op", "mode", "dtype", "rank", "kernel", "slots_an_element", "bytes_an_element", "share_h100", "share_h200",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    op: str
    mode: str
    rank: int
    kernel: str  # a pattern of the plain name, {t} the dtype's type
    streams: int

    def pattern(self, kind):
        return self.kernel.replace("{t}", kind)


TILE, UNIT, TENSOR, TENSOR_ROWS = (
    r"tile_rows_kernel<{t}, {t}, 8, %s, false, \(Part\)%d, %s>",
    r"unit_backward<{t}, {t}, 8, \(BackwardPart\)%d, \(Ranks\)%d>",
    r"tensor_backward<{t}, \(BackwardPart\)%d>",  # off by default, as the next
    r"tensor_rows_kernel<{t}, \(Part\)%d>",
)
CASES = (
    Case("edit", "forward", 0, r"stream_rows<{t}, {t}, 8, false, false>", 2),
    Case("edit_add", "forward", 0, r"stream_rows<{t}, {t}, 8, true, false>", 3),
    Case("edit_add_norm", "forward", 0, TILE % ("8, false", 4, "false"), 4),
    Case("edit_add_norm on the sum", "forward", 0, TILE % ("8, false", 5, "false"), 4),
    Case("edit", "forward", 4, TILE % ("16, true", 1, "true"), 2),
    Case("edit_add", "forward", 4, TILE % ("16, true", 2, "true"), 3),
    Case("edit_add on the sum", "forward", 4, TILE % ("16, true", 3, "true"), 3),
    Case("edit_add_norm", "forward", 4, TILE % ("16, true", 4, "true"), 4),
    Case("edit_add_norm on the sum", "forward", 4, TILE % ("16, true", 5, "true"), 4),
    Case("edit on tensor cores", "forward", 16, TENSOR_ROWS % 1, 2),
    Case("edit_add on tensor cores", "forward", 16, TENSOR_ROWS % 2, 3),
    Case("edit", "backward", 0, r"column_sums<{t}, {t}, 8, false, true>", 3),
    Case("edit_add_norm", "backward", 0, UNIT % (1, 0), 6),
    Case("edit", "backward", 4, UNIT % (3, 1), 3),
    Case("edit_add_norm", "backward", 4, UNIT % (2, 1), 6),
    Case("edit on tensor cores", "backward", 4, TENSOR % 3, 3),
    Case("edit_add_norm on tensor cores", "backward", 4, TENSOR % 2, 6),
    Case("edit of LoReFT", "backward", 4, UNIT % (5, 2), 3),
    Case("edit_add_norm of LoReFT", "backward", 4, UNIT % (4, 1), 6),
)
DTYPES = {"bf16": "Brain", "f16": "Half"}


def slots_left(bytes_an_element, tb_s):
    """Instructions of one thread that the chip can issue while memory moves an element's bytes."""
    return bytes_an_element * MULTIPROCESSORS * CLOCK_GHZ * LANES / (tb_s * 1e3)


@dataclass
class Loop:
    first: int
    last: int
    own: list  # opcodes outside its inner loops
    inner: list

    def count(self, *names):
        return sum(op.split(".")[0] in names for op in self.own)


def loops(code):
    """The outermost loops of [(address, opcode, operands)]: what a branch backwards spans."""
    spans = {}
    for at, op, operands in code:
        target = re.search(r"\b0x([0-9a-f]+)", operands) if op.startswith("BRA") else None
        if target and int(target[1], 16) < at:
            first = int(target[1], 16)
            spans[first] = max(spans.get(first, 0), at)

    def within(low, high, spans):
        found = []
        while spans:
            first, last = spans[0]
            nested = [s for s in spans[1:] if s[0] <= last]
            inner = within(first, last, nested)
            own = [op for at, op, _ in code if first <= at <= last and not any(i.first <= at <= i.last for i in inner)]
            found.append(Loop(first, max([last, *(s[1] for s in nested)]), own, inner))
            spans = spans[1 + len(nested) :]
        return found

    return within(0, code[-1][0], sorted(spans.items()))


def total(loop):
    return len(loop.own) + sum(map(total, loop.inner))


def tile_slots(loop, kind, rank, chunks, threads):
    """Instructions that a thread issues for one tile of two rows: `kind` is "tile" or "unit"."""
    warps, groups = threads // 32, -(-rank // 4)

    def trips(inner, parent):
        if inner.count("SHFL"):
            return groups  # dot products of four ranks and two rows, and their tree
        if inner.count("FFMA") < 8:
            if parent is loop:  # a thread for each rank and row, or each rank: of few warps
                return -(-rank * 2 // 32) / warps
            return -(-warps // 4)  # shares of the warps, four at a time
        if kind == "tile" or (parent is not loop and not parent.count("SHFL")):
            a_rank = 32 if kind == "tile" or inner.count("STS") else 16  # both sums of a rank, d_read's and d_write's
            return -(-rank // (inner.count("FFMA") // a_rank))
        return chunks

    def issued(part):
        return len(part.own) + sum(trips(i, part) * issued(i) for i in part.inner)

    return issued(loop)


def tensor_slots(loop, chunks, warps):
    """The same for a tile of eight rows on tensor cores, of which a thread has `chunks` times 64 columns of its warp."""
    trips = {inner.first: chunks if inner.count("HMMA") else -(-warps // 4) / warps for inner in loop.inner}
    assert sorted(trips.values())[-2:] == [chunks] * 2, "two passes over the tile's columns"
    return len(loop.own) + sum(trips[inner.first] * total(inner) for inner in loop.inner)


def tensor_rows_slots(loop, rank, chunks, warps):
    """The same for a tile of sixteen rows, whose loops are: eight ranks, columns; z, shares; columns, eight ranks."""
    project, finish, edit = loop.inner
    (columns,), (shares,), (combine,) = project.inner, finish.inner, edit.inner
    assert columns.count("HMMA") and combine.count("HMMA") and not total(finish) > 200
    groups, z = rank // 8, -(-rank * 16 // (32 * warps))
    projected = groups * (len(project.own) + chunks * len(columns.own))
    finished = z * (len(finish.own) + -(-warps // 4) * len(shares.own))
    return len(loop.own) + projected + finished + chunks * (len(edit.own) + groups * len(combine.own))


def slots_an_element(kernel, code, rank):
    """Of 16-bit rows of WIDTH columns."""
    main = max(loops(code), key=total)
    if kernel.startswith(("stream_rows", "column_sums")):
        assert not main.inner, f"{kernel}: loops that bench/slots.py does not know"
        return len(main.own) / 32  # four rows of eight columns
    if kernel.startswith("tensor_rows"):
        return tensor_rows_slots(main, rank, WIDTH // 64 // 8, 8) / (16 * WIDTH / 256)
    if kernel.startswith("tile_rows"):
        elements = 32 if rank else 16
        return tile_slots(main, "tile", rank, 1, WIDTH * 2 // elements) / elements
    main = max(main.inner, key=total)  # a unit's tiles; around them a run's units
    if kernel.startswith("tensor"):
        return tensor_slots(main, WIDTH // 64 // 8, 8) / (8 * WIDTH / 256)
    return tile_slots(main, "unit", rank, WIDTH // 2048, 256) / (2 * 8 * WIDTH // 2048)


def table(codes):
    """The CSV's rows from {kernel's plain name: its code}."""
    for case in CASES:
        for dtype, kind in DTYPES.items():
            names = [name for name in codes if re.fullmatch(case.pattern(kind), name)]
            assert len(names) == 1, f"{case}: {names}"
            slots, size = slots_an_element(names[0], codes[names[0]], case.rank), 2 * case.streams
            shares = [f"{slots / slots_left(size, tb_s):.2f}" for tb_s in COPY_TB_S.values()]
            row = (case.op, case.mode, dtype, case.rank, names[0], f"{slots:.1f}", size, *shares)
            yield dict(zip(FIELDS, row, strict=True))


UNITS = ("edit", "edit_add", "edit_add_norm", "edit_add_norm_backward", "edit_backward", "backward_tensor", "rows_tensor")


def compiled_codes(folder, units=UNITS):
    from cuda_tools import KERNELS, compile_unit, listing

    from .static import plain_names

    codes = {}
    for unit in units:
        code = listing(compile_unit(KERNELS / f"cuda/{unit}.cu", folder)[0])
        names = plain_names(list(code))
        codes |= {names[mangled]: body for mangled, body in code.items()}
    return codes


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="bench/results")
    path = pathlib.Path(parser.parse_args().out) / "cuda-slots.csv"
    with tempfile.TemporaryDirectory() as folder:
        rows = list(table(compiled_codes(folder)))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(*row.values(), sep="  ")


if __name__ == "__main__":
    main()
