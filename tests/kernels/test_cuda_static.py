"""bench/static.py: the occupancy it computes, the table it draws, and the CSV that is checked in."""

import csv
import importlib.util
from pathlib import Path

import pytest

from bench import slots

ROOT = Path(__file__).resolve().parents[2]
CSV = ROOT / "bench/results/cuda-static.csv"
spec = importlib.util.spec_from_file_location("bench_static", ROOT / "bench/static.py")
static = importlib.util.module_from_spec(spec)
spec.loader.exec_module(static)


@pytest.mark.parametrize(
    ("registers", "threads", "shared_bytes", "arch", "warps"),
    [
        (32, 256, 0, "sm_90", 64),  # nothing binds but the 64 warps
        (32, 1024, 0, "sm_90", 64),
        (32, 32, 0, "sm_90", 32),  # 32 blocks
        (33, 256, 0, "sm_90", 48),  # 33 registers are given out as 40
        (64, 512, 0, "sm_90", 32),
        (128, 256, 0, "sm_90", 16),
        (129, 256, 0, "sm_90", 8),  # 136: three warps a quarter, so one block of eight
        (255, 256, 0, "sm_90", 8),
        (128, 512, 0, "sm_90", 16),
        (128, 256, 113 * 1024, "sm_90", 16),  # two blocks of 113 KB and one of the system's for each
        (128, 256, 113 * 1024 + 1, "sm_90", 8),
        (128, 256, 227 * 1024, "sm_90", 8),
        (128, 256, 113 * 1024, "sm_80", 8),
        (128, 256, 81 * 1024, "sm_80", 16),
        (128, 256, 164 * 1024, "sm_80", 0),  # more than a block can have
    ],
)
def test_warps_per_multiprocessor(registers, threads, shared_bytes, arch, warps):
    assert static.warps_per_sm(registers, threads, shared_bytes, arch) == warps


def test_the_table_has_a_line_for_each_kernel_of_vectors(tmp_path):
    row = dict.fromkeys(static.FIELDS, "1") | {"arch": "sm_90", "dtype": "bf16", "path": "vectors", "kernel": "a<b>"}
    row |= {"op": "edit", "mode": "backward", "shared_bytes": "2048", "spill_bytes": "0", "ldl_stl": "0"}
    path = tmp_path / "static.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, static.FIELDS)
        writer.writeheader()
        writer.writerows([row, row | {"path": "slots"}, row | {"path": "", "spill_bytes": "8"}, row | {"path": "gate"}])
    lines = static.markdown(path).splitlines()
    assert len(lines) == 6 and lines[3] == lines[2].replace("backward", "backward *")
    assert lines[2] == "| edit backward | bf16 | 1 | `a<b>` | 1 | 1 | 2 | 0 | 1 / 1 | 1 | 1 | 1 |"
    assert lines[5].startswith("4 rows; 1 kernels spill; 1 instantiations")


def test_the_checked_in_table_has_every_case_and_no_spill():
    rows = list(csv.DictReader(CSV.open()))
    assert tuple(rows[0]) == static.FIELDS
    cases = {(r["op"], r["mode"], r["dtype"], r["rank"], r["path"]) for r in rows if r["path"]}
    assert cases == {tuple(map(str, case)) for case in static.cases()}
    assert {r["spill_bytes"] for r in rows} == {r["ldl_stl"] for r in rows} == {"0"}
    for r in rows:
        if r["path"] in ("vectors", "gate") and "+" not in r["dtype"] and r["kernel"] != "reduce_kernel":
            assert r["narrow_accesses"] == "0", r
        assert not r["path"] or int(r["warps_per_sm"]) > 0, r


def test_bytes_of_the_checked_in_table_are_the_least():
    """Each stream of 4096 columns once: what bench/kernels/cases.py counts."""
    streams = {
        ("edit", "forward"): 2, ("edit_add", "forward"): 3, ("edit_add_norm", "forward"): 4, ("project", "forward"): 1,
        ("edit", "backward"): 3, ("edit_add_norm", "backward"): 6, ("project", "backward"): 2,
    }  # fmt: skip
    for r in csv.DictReader(CSV.open()):
        size = {"f32": 4, "bf16": 2, "f16": 2}.get(r["dtype"])
        if size and (r["path"] == "gate" or (r["path"] == "vectors" and r["rank"] in "0")):
            assert int(r["row_bytes"]) == streams[r["op"], r["mode"]] * size * 4096, r


def loop(first, last, names, *inner):
    return slots.Loop(first, last, names, list(inner))


def test_loops_are_found_by_their_branches_back():
    code = [
        (0, "LDC", " R1, c[0x0][0x28] "), (16, "MOV", " R0, R1 "), (32, "FFMA", " R2, R2, R3, R4 "), (48, "BRA", " 0x20 "),
        (64, "STG.E.128", " [R2], R4 "), (80, "BRA", " 0x10 "), (96, "BRA", " 0x60 "),
    ]  # fmt: skip
    (outer,) = slots.loops(code)  # the last is where a kernel ends, on itself
    assert (outer.first, outer.last, outer.own) == (16, 80, ["MOV", "STG.E.128", "BRA"])
    assert [i.own for i in outer.inner] == [["FFMA", "BRA"]] and slots.total(outer) == 5


def test_trips_of_a_tiles_loops():
    """A group of four ranks; the warps' shares four at a time, by one warp of eight; z @ write by the ranks in its loop."""
    dots, combine = loop(1, 2, ["SHFL"] * 9 + ["FFMA"] * 16), loop(5, 6, ["FFMA"] * 32)
    shares = loop(3, 4, ["LDS"] * 10, loop(3, 3, ["FADD"] * 4))
    whole = loop(0, 9, ["LDG"] * 100, dots, shares, combine)
    assert slots.tile_slots(whole, "tile", 4, 1, 256) == 100 + 25 + (10 + 2 * 4) / 8 + 4 * 32
    assert slots.tile_slots(whole, "tile", 5, 1, 256) == 100 + 2 * 25 + (10 + 2 * 4) / 8 + 5 * 32
    assert slots.tile_slots(whole, "tile", 17, 1, 256) == 100 + 5 * 25 + (10 + 2 * 4) * 2 / 8 + 17 * 32
    two = loop(0, 9, ["LDG"] * 100, dots, shares, loop(5, 6, ["FFMA"] * 64))
    assert slots.tile_slots(two, "tile", 4, 1, 256) == 100 + 25 + (10 + 2 * 4) / 8 + 2 * 64


def test_trips_of_a_tile_on_tensor_cores():
    passes = loop(1, 2, ["HMMA"] * 8 + ["FADD"] * 12), loop(5, 6, ["HMMA"] * 60 + ["FFMA"] * 40)
    whole = loop(0, 9, ["LDS"] * 100, passes[0], loop(3, 4, ["LDS", "FADD"] * 4), passes[1])
    assert slots.tensor_slots(whole, 8, 8) == 100 + 8 * 20 + 2 / 8 * 8 + 8 * 100
    project = loop(1, 4, ["STS"] * 30, loop(2, 3, ["HMMA"] * 16))
    finish, edit = loop(5, 8, ["LDS"] * 40, loop(6, 7, ["FADD"] * 4)), loop(9, 12, ["FFMA"] * 50, loop(10, 11, ["HMMA"] * 24))
    tile = loop(0, 13, ["BAR"] * 10, project, finish, edit)
    assert slots.tensor_rows_slots(tile, 16, 8, 8) == 10 + 2 * (30 + 8 * 16) + (40 + 2 * 4) + 8 * (50 + 2 * 24)


def test_slots_that_bytes_leave():
    assert slots.slots_left(1, 3.0) == pytest.approx(9.88, abs=0.01) and slots.slots_left(12, 4.3) == pytest.approx(82.8, abs=0.1)


def test_the_checked_in_slots_are_of_every_case():
    rows = list(csv.DictReader((ROOT / "bench/results/cuda-slots.csv").open()))
    assert tuple(rows[0]) == slots.FIELDS
    assert {(r["op"], r["mode"], int(r["rank"]), r["dtype"]) for r in rows} == {
        (c.op, c.mode, c.rank, dtype) for c in slots.CASES for dtype in slots.DTYPES
    }
    for r in rows:
        left = slots.slots_left(int(r["bytes_an_element"]), slots.COPY_TB_S["H200"])
        assert float(r["share_h200"]) == pytest.approx(float(r["slots_an_element"]) / left, abs=0.01)
