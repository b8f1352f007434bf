"""kernels/cuda/tensor.h and what is compiled with FASTEDIT_TENSOR (off by default), under the emulator.

The promise is emulated_cases.py's, as for every other kernel: float64, twice eager's error and one unit in the last place.
"""

import os
import subprocess
import sys

import emulated_cases as emulated
import pytest
import torch
from emulated_cases import BF16, F32, HALF, make_form, pytestmark, stream

__all__ = ["pytestmark"]
harness = emulated.harness
PLAIN = ("coefficient", "weight")  # gradients that the kernels do not make


@pytest.fixture(scope="module")
def cuda(tmp_path_factory):
    return emulated.built(tmp_path_factory, "cuda_tensor", "FASTEDIT_TENSOR")


@pytest.fixture(autouse=True)
def plain_schedule(cuda):
    torch.manual_seed(0)
    cuda.schedule()
    cuda.shift = 0


def launched(cuda):
    return cuda.launches()[0][0]


@pytest.mark.parametrize("columns", [8, 4])
def test_the_emulators_product_of_matrices(cuda, columns):
    """16 × 8 by 8 × 8 and 16 × 4 by 4 × 8 of small integers, which no rounding touches, and sums that are there before."""
    a, b, c = torch.randint(-9, 9, (16, columns)), torch.randint(-9, 9, (columns, 8)), torch.randint(-9, 9, (16, 8))
    out = c.float().contiguous()
    operands = [t.float().contiguous() for t in (a, b)]
    assert cuda.library.product(*(harness.PTR(t.data_ptr()) for t in (*operands, out)), columns) == 0
    assert torch.equal(out, (a @ b + c).float())


def test_a_product_of_more_bits_than_tf32_has_fails(cuda):
    a, b, out = torch.full((16, 8), 1 + 2.0**-11), torch.ones(8, 8), torch.zeros(16, 8)
    assert cuda.library.product(*(harness.PTR(t.data_ptr()) for t in (a, b, out)), 8) != 0
    assert b"no tf32" in cuda.library.emulator_message()


@pytest.mark.parametrize("dtype", [BF16, HALF], ids=["bf16", "f16"])
@pytest.mark.parametrize("size", [(1, 64), (8, 64), (300, 64), (33, 384), (9, 1024), (17, 4096)], ids=str)
def test_backward_of_four_ranks(cuda, size, dtype):
    rows, width = size
    form = make_form(rows, width, 4)
    for kind, view in enumerate(("plain", "strided")):
        emulated.check_edit_backward(cuda, rows, width, (dtype, dtype), form, view=view, without=PLAIN)
        assert "tensor_backward" in launched(cuda)
        emulated.check_norm_backward(cuda, rows, width, (dtype, dtype), form, kind, False, view, PLAIN)
        assert "tensor_backward" in launched(cuda)


def test_backward_of_scales_that_differ(cuda):
    """Gradients of a loss that is scaled, rows of many sizes, and a large write vector."""
    rows, width = 40, 256
    form = make_form(rows, width, 4)
    form["write"][2] *= 1e4
    for dtype, scale in ((BF16, 2.0**30), (BF16, 2.0**-30), (HALF, 2.0**-8)):
        factor = scale * 4.0 ** -torch.arange(rows).float()[:, None].fmod(5)
        with pytest.MonkeyPatch.context() as patch:
            plain = emulated.stream
            patch.setattr(emulated, "stream", lambda *a, p=plain, f=factor, **k: (p(*a, **k).float() * f).to(a[2]))
            emulated.check_edit_backward(cuda, rows, width, (dtype, dtype), form, without=("coefficient", "grad_z"))
            assert "tensor_backward" in launched(cuda)


@pytest.mark.parametrize(
    "case",
    ["rank", "dtype", "width", "norm weight", "coefficient", "slots", "scale", "no room"],
)
def test_what_it_does_not_serve_goes_to_the_other_kernels(cuda, case):
    rows, width = 20, 4096 + 64 if case == "no room" else 24 if case == "width" else 64
    slots = 2 if case == "slots" else None
    form = make_form(rows, width, 8 if case == "rank" else 4, slots, "rows" if case == "coefficient" else None)
    without = [n for n in PLAIN if n != case]
    if case == "scale":
        del form["scale"]
    pair = (F32, F32) if case == "dtype" else (BF16, BF16)
    if case == "norm weight":
        emulated.check_norm_backward(cuda, rows, width, pair, form, 0, False, without=("coefficient",))
    else:
        emulated.check_edit_backward(cuda, rows, width, pair, form, without=without)
    assert "tensor_backward" not in launched(cuda)


def backward(cuda, rows, width=192, change=lambda **streams: None):
    grad, hidden, z = stream(rows, width, BF16), stream(rows, width, BF16), torch.randn(rows, 4)
    change(grad=grad, hidden=hidden, z=z)
    needs = [True] * 6 + [False]
    found = cuda.edit_backward(grad, hidden, None, make_form(rows, width, 4), None, z, needs, BF16, (rows, width))
    assert "tensor_backward" in launched(cuda)
    return found


def test_bits_depend_on_neither_grid_nor_thread_order(cuda):
    found = []
    for sms, seed in ((1, 0), (3, 1), (132, 2), (7, 3)):
        torch.manual_seed(1)
        cuda.schedule(sms, seed)
        found.append(backward(cuda, 150))
    assert all(emulated.same_bits(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True) if a is not None)


def test_what_is_not_finite_stays_where_it_belongs(cuda):
    """A row's d_hidden, and the sums of its own column or of its rank: an absent product is no product with 0."""
    def infinite(grad, hidden, z):
        hidden[5, 70] = torch.inf

    torch.manual_seed(2)
    clean = backward(cuda, 24)
    torch.manual_seed(2)
    d_hidden, d_scale, d_bias, d_read, d_offset, d_write, _ = backward(cuda, 24, change=infinite)
    for found, before in ((d_hidden, clean[0]), (d_bias, clean[2]), (d_offset, clean[4]), (d_write, clean[5])):
        assert torch.equal(found, before)
    for found, before in ((d_scale[None], clean[1][None]), (d_read, clean[3])):
        wrong = ~torch.isfinite(found)
        assert wrong[:, 70].all() and wrong.sum() == len(found)
        assert torch.equal(found[~wrong], before[~wrong])

    def not_a_number(grad, hidden, z):
        grad.view(torch.int16)[5, 70] = 0x7FFF

    torch.manual_seed(2)
    d_hidden, _, d_bias, d_read, d_offset, d_write, _ = backward(cuda, 24, change=not_a_number)
    rows = torch.isnan(d_hidden).all(1)
    assert rows[5] and rows.sum() == 1 and torch.equal(d_hidden[~rows], clean[0][~rows])
    assert torch.isnan(d_bias[70]) and torch.isnan(d_bias).sum() == 1
    assert torch.isnan(d_write[:, 70]).all() and torch.isnan(d_write).sum() == 4
    assert torch.isnan(d_read).all() and torch.isnan(d_offset).all()


def test_the_parts_of_a_factor_are_all_of_it(cuda):
    """Of one row with a gradient of ones d_write is z, of one of ones d_read is q, to the bit."""
    rows, needs = torch.zeros(3, 64, dtype=BF16), [True] * 6 + [False]
    rows[0] = 1
    for _ in range(20):
        z = torch.randn(3, 4)
        found = cuda.edit_backward(rows, rows, None, make_form(3, 64, 4), None, z, needs, BF16, (3, 64))
        assert torch.equal(found[5], z[0][:, None].expand(4, 64))
        assert torch.equal(found[3], found[4][:, None].expand(4, 64)) and found[4].any()


@pytest.mark.parametrize("dtype", [BF16, HALF], ids=["bf16", "f16"])
def test_ranks_that_cancel(cuda, dtype):
    """q @ read is a small difference of large terms: both have more bits than one part."""
    form = make_form(9, 64, 4)
    form["write"][:2] = 1e3 * form["write"][:1]
    form["read"][1] = -form["read"][0] * (1 + 2.0**-10 * torch.randn(64))
    emulated.check_edit_backward(cuda, 9, 64, (dtype, dtype), form, without=("coefficient", "grad_z"))
    assert "tensor_backward" in launched(cuda)


def test_streams(cuda):
    """Each once; the norm's two once more for the second pass, from L2."""
    rows, width = 16, 4096
    backward(cuda, rows, width)
    assert cuda.moved["grad"] == cuda.moved["hidden"] == (1.0, 0.0) and cuda.moved["d_hidden"] == (0.0, 1.0)
    emulated.check_norm_backward(cuda, rows, width, (BF16, BF16), make_form(rows, width, 4), 0, False, without=PLAIN)
    assert "tensor_backward" in launched(cuda)
    assert cuda.moved["grad_residual"] == cuda.moved["x"] == (1.0, 0.0)
    assert cuda.moved["grad_normed"] == cuda.moved["residual_out"] == (2.0, 0.0)
    assert cuda.moved["d_x"] == cuda.moved["d_residual"] == (0.0, 1.0)


STEP = """
import ctypes, sys
import torch
from bench.gpu import switches
from bench.gpu.device import Table
from bench.gpu.switches import TENSOR, Case

present, switched = (ctypes.CDLL(path) for path in sys.argv[1:3])

class Wrong:  # of backwards the first element of d_hidden or d_x is wrong
    def __getattr__(self, name):
        if not name.endswith("backward"):
            return getattr(switched, name)
        def call(args, *more):
            error = getattr(switched, name)(args, *more)
            ctypes.c_uint16.from_address(getattr(args._obj, "d_hidden", None) or args._obj.d_x).value ^= 0x4000
            return error
        return call

cases = [Case(TENSOR, op, 17, 384, rank)
         for op, rank in (*switches.BACKWARDS, ("edit", 8), ("edit_add", 16))]
torch.manual_seed(0)
for name, library in (("right", switched), ("wrong", Wrong())):
    print(switches.run(Table(f"{sys.argv[3]}/{name}.csv", switches.FIELDS), {"": present, TENSOR: library}, cases))
"""


def test_the_step_of_make_gpu_more_checks_and_times_both(cuda, tmp_path_factory, tmp_path):
    """bench/gpu/switches.py --more, as far as it goes without a GPU."""
    present = emulated.built(tmp_path_factory, "cuda_emulated")
    env = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST_")} | {"FASTEDIT_GPU_REHEARSAL": "1"}
    command = [sys.executable, "-c", STEP, str(present.path), str(cuda.path), str(tmp_path)]
    done = subprocess.run(command, env=env, cwd=harness.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.isdigit()] == ["0", "2"], done.stdout


# Forward, of ranks that are a multiple of eight


@pytest.mark.parametrize("dtype", [BF16, HALF], ids=["bf16", "f16"])
@pytest.mark.parametrize(("rows", "width", "rank"), [(1, 64, 8), (16, 128, 16), (37, 384, 24), (50, 2048, 16), (9, 4096, 64)])
def test_forward_of_many_ranks(cuda, rows, width, rank, dtype):
    form = make_form(rows, width, rank)
    x, residual = (stream(rows, width, dtype, view) for view in ("strided", "plain"))
    for given in (form, {n: p for n, p in form.items() if n not in ("scale", "offset")}):
        emulated.check_edit(cuda, x, given)
        assert "tensor_rows" in launched(cuda)
        got = cuda.edit_add(x, residual, given, want_z=True)
        assert "tensor_rows" in launched(cuda)
        eager = emulated.reference.edit_add(x, residual, *emulated.reference_form(given, F32), False, True)
        double = emulated.double((x, residual))
        exact = emulated.reference.edit_add(*double, *emulated.reference_form(given, torch.float64), False, True)
        emulated.assert_all("out z", got, exact, eager)


def test_a_rows_forward_depends_on_no_other_row_grid_or_order(cuda):
    x, residual, form = stream(70, 192, BF16), stream(70, 192, BF16), make_form(70, 192, 16)
    whole, z = cuda.edit_add(x, residual, form, want_z=True)
    for sms, seed in ((1, 1), (132, 2), (2, 3)):
        cuda.schedule(sms, seed)
        out, of_part = cuda.edit_add(x[3:40], residual[3:40], form, want_z=True)
        assert emulated.same_bits(out, whole[3:40]) and emulated.same_bits(of_part, z[3:40])
    x[5] = torch.inf
    out = cuda.edit_add(x, residual, form)[0]
    assert not torch.isfinite(out[5]).any()
    out[5] = whole[5]
    assert emulated.same_bits(out, whole)


@pytest.mark.parametrize("case", ["rank 12", "fp32", "on the sum", "coefficient", "width", "no room"])
def test_a_forward_that_it_does_not_serve(cuda, case):
    rows, width = 5, {"width": 24, "no room": 8192}.get(case, 64)
    form = make_form(rows, width, 12 if case == "rank 12" else 8, None, "rows" if case == "coefficient" else None)
    x, residual = (stream(rows, width, F32 if case == "fp32" else BF16) for _ in range(2))
    cuda.edit_add(x, residual, form, case == "on the sum")
    assert "tensor_rows" not in launched(cuda)


def test_streams_of_a_forward(cuda):
    cuda.edit_add(stream(16, 4096, BF16), stream(16, 4096, BF16), make_form(16, 4096, 16))
    assert cuda.moved["x"] == cuda.moved["residual"] == (1.0, 0.0) and cuda.moved["out"] == (0.0, 1.0)
