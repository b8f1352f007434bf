"""bench/static.py: the occupancy it computes, the table it draws, and the CSV that is checked in."""

import csv
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
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
