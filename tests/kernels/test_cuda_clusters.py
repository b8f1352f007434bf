"""Wide rows that a cluster of blocks shares (kernels/cuda/cluster.h), switched on by FASTEDIT_CLUSTERS: under the emulator.

Checked as test_cuda_emulated.py checks. Two blocks share 9216 columns, four 12288, eight 20480; 8704 have no even shares.
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

import emulated_cases as emulated
import pytest
import torch
from emulated_cases import BF16, F32, HALF, PAIRS, make_form, names, pytestmark, stream
from test_cuda_emulated_gates import GATES, check, gated
from test_cuda_streams import once

harness, reference, same_bits = emulated.harness, emulated.reference, emulated.same_bits
__all__ = ["pytestmark"]
WIDTHS = [9216, 12288, 20480]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    made = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cuda_emulated"
    made.mkdir(exist_ok=True)
    return made


@pytest.fixture(scope="module")
def switched(folder):
    return harness.build(folder, "FASTEDIT_CLUSTERS", ("edit_add_norm", "edit_gated"))


@pytest.fixture
def cuda(switched):
    switched.schedule()
    switched.shift = 0
    return switched


def shared(cuda):
    """Whether the last call was one launch of clusters, or one of the loop."""
    ((name, *_shape),) = cuda.launches()
    assert ("tile_rows" in name and "PartE6" in name) != ("loop_rows" in name), name
    return "tile_rows" in name


# The emulator


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (2, "wait for each other"), (3, "wait for each other"), (4, "more arrivals than expected"),
        (5, "no place of the cluster"), (6, "nobody has counted"),
    ],
)  # fmt: skip
def test_the_emulator_reports_a_broken_rule(cuda, rule, message):
    out = torch.zeros(128)
    assert cuda.library.break_cluster_rule(rule, 2, harness.PTR(out.data_ptr())) != 0
    assert message in cuda.library.emulator_message().decode()
    emulated.check_edit(cuda, stream(3, 9216, BF16), make_form(3, 9216, 2))  # and goes on


def test_what_is_sent_has_come_after_the_wait_alone(cuda):
    for rule, has_come in ((0, True), (1, False)):
        for seed in range(4):
            out = torch.zeros(128)
            cuda.schedule(seed=seed)
            assert cuda.library.break_cluster_rule(rule, 2, harness.PTR(out.data_ptr())) == 0
            assert (out == 3).all() == has_come


def test_a_launch_that_no_chip_has_fails(cuda):
    out = torch.zeros(256)
    assert cuda.library.break_cluster_rule(0, 3, harness.PTR(out.data_ptr())) == 9  # blocks that are no whole clusters
    cuda.schedule(shared_kib=99)
    assert cuda.library.break_cluster_rule(0, 2, harness.PTR(out.data_ptr())) == 9  # sm_89
    assert not out.any()


# The rows


@pytest.mark.parametrize("pair", PAIRS, ids=names)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", [0, 1, 2], ids=["rms", "gemma", "layer"])
def test_edit_add_norm(cuda, pair, width, kind):
    x, residual = stream(5, width, pair[0], "strided"), stream(5, width, pair[1])
    for rank, slots, on_sum in ((2, None, False), (5, 2, True), *([(0, None, False)] if width > 16384 else [])):
        emulated.check_edit_add_norm(cuda, x, residual, make_form(5, width, rank, slots, "rows"), kind, on_sum)
        assert shared(cuda)


@pytest.mark.parametrize("dtype", [F32, BF16, HALF], ids=names)
@pytest.mark.parametrize("rank", [1, 4, 17, 64])
def test_edit_and_project(cuda, dtype, rank):
    hidden = stream(3, 12288, dtype)
    for slots in (None, 2):
        form = make_form(3, 12288, rank, slots, "rows")
        _, z = emulated.check_edit(cuda, hidden, form)
        assert shared(cuda)
    form = make_form(3, 12288, rank)
    _, z = cuda.edit(hidden, form, want_z=True)
    assert same_bits(cuda.project(hidden, form["read"], form["offset"]), z) and shared(cuda)


@pytest.mark.parametrize("pair", PAIRS, ids=names)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_gates(cuda, pair, width, gate):
    x, residual = stream(5, width, pair[0]), stream(5, width, pair[1])
    for rank, slots in ((0, None), (3, 2)):
        form = gated(make_form(5, width, rank, slots, "rows"), x, *gate)
        check(cuda, "edit", (x,), form)
        assert shared(cuda)
        check(cuda, "edit_add", (x, residual), form, False)
        assert shared(cuda)
    form = gated(make_form(5, width, 3), x, *gate)
    out, normed, _z, mean, rstd = cuda.edit_add_norm(x, residual, None, None, form, kind=2)
    assert same_bits(out, cuda.edit_add(x, residual, form)[0])
    norm = reference.edit_add_norm.__globals__["norm"]
    exact, eager = norm(out.double(), None, None, 2, 1e-6), norm(out, None, None, 2, 1e-6)
    emulated.assert_all("normed mean rstd", (normed, mean, rstd), exact, eager, [None, out, None])


def test_rows_that_are_not_the_edits_keep_their_bits(cuda):
    bits = torch.randint(-(2**15), 2**15, (6, 12288), dtype=torch.int16)
    hidden = bits.where(bits != harness.Outputs.POISON[BF16], 0).view(BF16)
    form = make_form(6, 12288, 3, 2, "rows")
    form["slot"], form["bias"][:] = torch.tensor([-1, 2] * 3, dtype=torch.int32), torch.nan
    assert same_bits(cuda.edit(hidden, form)[0], hidden) and shared(cuda)


@pytest.mark.parametrize("width", WIDTHS)
def test_bits_depend_on_neither_grid_nor_order_nor_other_rows(cuda, width):
    x, residual, weight = stream(7, width, BF16), stream(7, width, BF16), torch.rand(width).to(BF16)
    form = gated(make_form(7, width, 3, 2), x, 6.0, 1.0)
    runs = []
    for multiprocessors, seed in ((3, 0), (1, 5), (132, 9), (20, 1)):
        cuda.schedule(multiprocessors, seed)
        runs.append(cuda.edit_add_norm(x, residual, weight, None, form, kind=2, want_z=True))
        assert shared(cuda)
    for run in runs[1:]:
        assert all(same_bits(a, b) for a, b in zip(runs[0], run, strict=True))
    one = slice(4, 5)
    alone = cuda.edit_add_norm(
        x[one], residual[one], weight, None, form | {"slot": form["slot"][one]}, kind=2, want_z=True
    )
    assert all(same_bits(a, b[one]) for a, b in zip(alone, runs[0], strict=True))


@pytest.mark.parametrize("width", WIDTHS)
def test_each_stream_moves_once(cuda, width):
    x, residual, weight = stream(4, width, BF16), stream(4, width, BF16), torch.rand(width).to(BF16)
    for form in (make_form(4, width, 4), gated(make_form(4, width), x, 0.0, 1.0)):
        cuda.edit(x, form)
        once(cuda.moved, "hidden", "out")
        cuda.edit_add(x, residual, form)
        once(cuda.moved, "x residual", "out")
        cuda.edit_add_norm(x, residual, weight, None, form)
        once(cuda.moved, "x residual", "out normed")


def test_the_loop_takes_what_a_cluster_cannot(cuda, folder):
    def edits(library, rows, rank=2):
        library.edit(rows, make_form(len(rows), rows.shape[1], rank))
        return shared(library)

    wide = stream(3, 12288, BF16)
    assert edits(cuda, wide) and edits(cuda, wide[:1])
    assert not edits(cuda, stream(3, 8704, BF16)) and not edits(cuda, stream(3, 12288, BF16, "unaligned"))
    far = torch.empty(2**31 + 8 + 12288, dtype=BF16).as_strided((2, 12288), (2**31 + 8, 1))
    far.copy_(wide[:2])
    assert not edits(cuda, far)
    cuda.schedule(shared_kib=163)  # sm_80
    assert not edits(cuda, wide)
    plain = harness.build(folder)
    plain.schedule()
    assert not edits(plain, wide)


def test_no_rows(cuda):
    assert cuda.edit(torch.empty(0, 12288, dtype=BF16), make_form(0, 12288, 2), True)[0].shape == (0, 12288)


# The step of `make gpu` that decides (bench/gpu/switches.py), on both builds

STEP = """
import ctypes, pathlib, sys
import torch
from bench.gpu import switches
from bench.gpu.device import Table
from bench.gpu.switches import CLUSTERS, Case, PDL
import harness

folder, out = map(pathlib.Path, sys.argv[1:])
present = harness.build(folder).library
switched = harness.build(folder, "FASTEDIT_CLUSTERS", ("edit_add_norm", "edit_gated")).library

class Wrong:
    edit_add = switched.edit_add
    def edit(args, stream):  # the first element that it stores is wrong
        error = switched.edit(args, stream)
        ctypes.c_uint16.from_address(args._obj.out).value ^= 0x4000  # by a factor of 2^128
        return error

cases = [Case(CLUSTERS, "edit_add_norm", 3, 9216, 2), Case(CLUSTERS, "edit", 3, 9216, 2),
         Case(CLUSTERS, "edit", 3, 9216, 0, True), Case(PDL, "edit_add", 1, 64, 0)]
torch.manual_seed(0)
print(switches.run(Table(out / "right.csv", switches.FIELDS), {"": present, CLUSTERS: switched, PDL: switched}, cases))
print(switches.run(Table(out / "wrong.csv", switches.FIELDS), {"": present, CLUSTERS: Wrong, PDL: Wrong}, cases[1:]))
print(switches.run(Table(out / "none.csv", switches.FIELDS), {"": present}, cases[3:]))
"""


def test_the_step_of_make_gpu_checks_and_times_both(switched, folder, tmp_path):
    root = Path(__file__).resolve().parents[2]
    env = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST_")} | {"FASTEDIT_GPU_REHEARSAL": "1"}
    command = [sys.executable, "-c", STEP, str(folder), str(tmp_path)]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = [line for line in done.stdout.splitlines() if line.isdigit()]
    assert counts == ["0", "2", "1"], done.stdout  # edit is wrong twice; one that was not built
    right, wrong = (list(csv.DictReader((tmp_path / f"{name}.csv").open())) for name in ("right", "wrong"))
    assert len(right) == 4 and all(r["verdict"] == "ok" and float(r["of_present"]) > 0 for r in right)
    assert [r["verdict"].split(":")[0] for r in wrong] == ["WRONG", "WRONG", "ok"]
