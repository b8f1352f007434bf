"""How many times kernels/cuda moves each stream of rows, counted access by access under tests/cuda_emulator.

A kernel of this library is as fast as the bytes it moves: every input is to be read once, every output written
once. 1.0 is a pass over the stream; what a kernel reads again, from L1 or L2 or not, counts again.
"""

import emulated_cases as emulated
import pytest
import torch
from emulated_cases import BF16, F32, HALF, cuda, make_form, plain_schedule, pytestmark, stream

harness = emulated.harness
__all__ = ["cuda", "plain_schedule", "pytestmark"]

ROWS = 9  # a unit of eight and one of a single row
SUMS = "scale bias read offset write"


def once(moved, reads, writes, again=()):
    """Asserts that each of `reads` is loaded once, each of `writes` stored once, and nothing else moves."""
    expected = {name: (1.0, 0.0) for name in reads.split()} | {name: (0.0, 1.0) for name in writes.split()}
    expected |= {name: (times, 0.0) for name, times in dict(again).items()}
    found = {name: counts for name, counts in moved.items() if name != "workspace" and counts != (0.0, 0.0)}
    assert found == expected


def edit_backward(cuda, width, dtype, form, wanted, on_sum=False, rows=ROWS):
    rank = form["read"].shape[-2] if "read" in form else 0
    grad, hidden, residual = (stream(rows, width, dtype) for _ in range(3))
    z = torch.randn(rows, rank) if rank else None
    needs = ["hidden" in wanted, *(n in wanted and n in form for n in harness.PARAMETERS), "coefficient" in wanted]
    cuda.edit_backward(
        grad, hidden, residual if on_sum else None, form, None, z, needs, dtype, (rows, width)
    )
    return cuda.moved


def norm_backward(cuda, width, pair, form, wanted, kind=0, on_sum=False, rows=ROWS):
    x_dtype, dtype = pair
    rank = form["read"].shape[-2] if "read" in form else 0
    grad_residual, grad_normed, out, residual = (stream(rows, width, dtype) for _ in range(4))
    x, weight, rstd = stream(rows, width, x_dtype), torch.rand(width).to(dtype), torch.rand(rows)
    z = torch.randn(rows, rank) if rank else None
    needs = ["x" in wanted, *(n in wanted and n in form for n in harness.PARAMETERS), False, "residual" in wanted]
    cuda.edit_add_norm_backward(
        grad_residual, grad_normed, out, x, residual if on_sum else None, weight, torch.randn(rows), rstd, form,
        None, z, on_sum, kind, needs, ("weight" in wanted, "norm_bias" in wanted), x_dtype, dtype, (rows, width),
    )  # fmt: skip
    return cuda.moved


# Forward


@pytest.mark.parametrize("width", [64, 4096, 8192])
@pytest.mark.parametrize("rank", [0, 4])
def test_forward_moves_each_stream_once(cuda, width, rank):
    rows = 8  # whole tiles: a tile's missing rows repeat the last one
    for dtype in (F32, BF16):
        x, residual, form = stream(rows, width, dtype), stream(rows, width, dtype), make_form(rows, width, rank)
        cuda.edit(x, form)
        once(cuda.moved, "hidden", "out")
        cuda.edit_add(x, residual, form)
        once(cuda.moved, "x residual", "out")
        cuda.edit_add_norm(x, residual, torch.rand(width).to(dtype), None, form)
        once(cuda.moved, "x residual", "out normed")
    if rank:
        cuda.project(x, form["read"], form["offset"])
        once(cuda.moved, "hidden", "")


def test_rows_too_wide_for_registers_are_formed_again(cuda):
    """Once for z, once for out and the squares, once for normed; from L1 or L2."""
    width = 16400
    x, residual, weight = stream(2, width, BF16), stream(2, width, BF16), torch.rand(width).to(BF16)
    for rank, again in ((0, 2.0), (2, 3.0)):
        cuda.edit_add_norm(x, residual, weight, None, make_form(2, width, rank))
        once(cuda.moved, "", "out normed", {"x": again, "residual": again})


# Backward


@pytest.mark.parametrize("width", [64, 2048, 4096, 8192])
@pytest.mark.parametrize("pair", [(F32, F32), (BF16, BF16), (HALF, F32)], ids=emulated.names)
def test_edit_add_norm_backward_is_one_pass(cuda, width, pair):
    """Six streams with the parameters' sums, where three kernels moved nine."""
    form = make_form(ROWS, width)
    moved = norm_backward(cuda, width, pair, form, "x residual scale bias weight")
    once(moved, "grad_residual grad_normed residual_out x", "d_x d_residual")
    written, read = moved["workspace"][::-1]
    assert written == read > 0  # a partial of each sum: out and in
    moved = norm_backward(cuda, width, pair, form, "x residual bias")
    once(moved, "grad_residual grad_normed residual_out", "d_x d_residual")
    moved = norm_backward(cuda, width, pair, form, "x residual")
    once(moved, "grad_residual grad_normed residual_out", "d_x d_residual")
    assert moved["workspace"] == (0, 0)
    moved = norm_backward(cuda, width, pair, form, "x scale bias weight", on_sum=True)
    once(moved, "grad_residual grad_normed residual_out x residual", "d_x")
    if width < 8192 or pair[1] == BF16:
        moved = norm_backward(cuda, width, pair, make_form(ROWS, width, 2), "x residual read offset write")
        once(moved, "grad_residual grad_normed residual_out x", "d_x d_residual")


@pytest.mark.parametrize("slots", [1, 40])
def test_backward_over_slots_is_one_pass_too(cuda, slots):
    form = make_form(300, 384, 0, slots, "rows")
    moved = norm_backward(cuda, 384, (BF16, BF16), form, "x residual scale bias weight", rows=300)
    once(moved, "grad_residual grad_normed residual_out x", "d_x d_residual")
    moved = edit_backward(cuda, 384, BF16, make_form(300, 384, 3, slots), f"hidden {SUMS}", rows=300)
    once(moved, "grad hidden", "d_hidden")


def test_rows_without_room_on_the_chip_come_again_from_l2(cuda):
    """16,384 columns: three sums fit, but no stage beside them; what the norm's means are of is read twice."""
    form = make_form(4, 16384)
    moved = norm_backward(cuda, 16384, (BF16, BF16), form, "x residual scale bias weight", rows=4)
    once(moved, "grad_residual x", "d_x d_residual", {"grad_normed": 2.0, "residual_out": 2.0})


@pytest.mark.parametrize("width", [64, 4096, 16392])
def test_edit_backward_of_rank_0_is_one_pass(cuda, width):
    moved = edit_backward(cuda, width, BF16, make_form(ROWS, width), f"hidden {SUMS}")
    once(moved, "grad hidden", "d_hidden")
    moved = edit_backward(cuda, width, BF16, make_form(ROWS, width), f"hidden {SUMS}", on_sum=True)
    once(moved, "grad hidden residual", "d_hidden")
    moved = edit_backward(cuda, width, BF16, make_form(ROWS, width), "hidden bias")
    once(moved, "grad", "d_hidden")


@pytest.mark.parametrize(
    ("width", "rank"), [(64, 1), (64, 8), (1024, 8), (2048, 8), (4096, 1), (4096, 4), (8192, 1)], ids=str
)
def test_edit_backward_of_small_rank_is_one_pass(cuda, width, rank):
    """Where 2 + 2 rank sums of 4 bytes and two rows fit beside each other in 227 KB."""
    form = make_form(ROWS, width, rank)
    once(edit_backward(cuda, width, BF16, form, f"hidden {SUMS}"), "grad hidden", "d_hidden")
    once(edit_backward(cuda, width, BF16, form, "hidden"), "grad", "d_hidden")
    once(edit_backward(cuda, width, BF16, form, "hidden coefficient"), "grad hidden", "d_hidden")


def test_rank_8_at_width_4096_leaves_d_read_over(cuda):
    """Without d_scale nothing else reads h, so LoReFT's backward is one pass all the same."""
    form = make_form(ROWS, 4096, 8)
    once(edit_backward(cuda, 4096, BF16, form, "hidden read offset write"), "grad hidden", "d_hidden")
    moved = edit_backward(cuda, 4096, BF16, form, f"hidden {SUMS}")
    once(moved, "grad", "d_hidden", {"hidden": 2.0})


def test_project_backward_is_one_pass(cuda):
    read, grad_z = torch.randn(4, 4096), torch.randn(ROWS, 4)
    cuda.project_backward(grad_z, stream(ROWS, 4096, BF16), read, (True, True, True), BF16, 4096)
    once(cuda.moved, "hidden", "d_hidden")


# Every way that sums are left over, on a chip whose blocks have 48 KB


@pytest.mark.parametrize("rank", [9, 17, 64])
@pytest.mark.parametrize("slots", [None, 2])
def test_sums_that_do_not_fit_are_taken_later(cuda, rank, slots):
    width = 104 if rank == 64 else 384  # 128 fp32 sums of 104 columns are 53 KB already
    cuda.schedule(multiprocessors=5, shared_kib=48)
    for pair, kind, on_sum in [((BF16, BF16), 0, True), ((BF16, F32), 2, False), ((HALF, F32), 2, True)]:
        form = make_form(70, width, rank, slots, "rows")
        emulated.check_norm_backward(cuda, 70, width, pair, form, kind, on_sum)
        emulated.check_edit_backward(cuda, 70, width, pair[:1] * 2, form, on_sum)
        lora = make_form(70, width, rank, slots, None, "offset write")
        emulated.check_norm_backward(cuda, 70, width, pair, lora, kind, on_sum, without=("grad_residual",))
    emulated.check_norm_backward(cuda, 7, 100, (BF16, BF16), make_form(7, 100, rank), 2, True, "unaligned")


@pytest.mark.parametrize("width", [4104, 8200])
def test_vector_sums_that_do_not_fit_take_another_launch(cuda, width):
    cuda.schedule(multiprocessors=5, shared_kib=48)
    for pair in ((F32, F32), (BF16, BF16), (BF16, F32)):
        emulated.check_norm_backward(cuda, 11, width, pair, make_form(11, width, 0, None, "rows"), 2, False)
        if width == 4104 or pair == (BF16, BF16):
            emulated.check_norm_backward(cuda, 11, width, pair, make_form(11, width, 3, 2, "rows"), 2, True)
    form = make_form(ROWS, 8200)
    moved = norm_backward(cuda, 8200, (BF16, BF16), form, "x residual scale bias weight")
    assert moved["d_x"] == (0, 1) and moved["d_residual"] == (0, 1)


@pytest.mark.parametrize("rank", [0, 3])
def test_vector_sums_wider_than_the_chip_leave_the_unit_kernel_out(cuda, rank):
    """16,400 columns of one fp32 sum are 64 KB."""
    cuda.schedule(multiprocessors=5, shared_kib=48)
    for pair, kind, on_sum in [((F32, F32), 0, True), ((BF16, BF16), 2, True), ((BF16, F32), 2, False)]:
        form = make_form(5, 16400, rank, 2 if rank else None, "rows")
        emulated.check_norm_backward(cuda, 5, 16400, pair, form, kind, on_sum)
        assert not [name for name, *_ in cuda.launches() if "unit_backward" in name]
        emulated.check_edit_backward(cuda, 5, 16400, pair[:1] * 2, form, on_sum)
        assert not [name for name, *_ in cuda.launches() if "unit_backward" in name]
    moved = norm_backward(cuda, 16400, (BF16, BF16), make_form(ROWS, 16400, rank), "x residual read write")
    assert [name for name, *_ in cuda.launches() if "unit_backward" in name]  # no sum of one vector is wanted
    assert moved["d_x"] == moved["d_residual"] == (0, 1)


def test_a_launch_that_can_take_no_sum_is_an_error(cuda):
    cuda.schedule(shared_kib=48)
    for width, error in [(8192, 0), (11520, 0), (11528, 9), (1 << 20, 9)]:
        assert cuda.library.next_launch(harness.I64(width)) == error, width


def test_a_rank_whose_dot_products_have_no_room_leaves_the_unit_kernel_out(cuda):
    """530 of two rows and eight warps are more than 48 KB; of one row in the row kernel 25."""
    cuda.schedule(multiprocessors=5, shared_kib=48)
    form = make_form(3, 2048, 530)
    emulated.check_edit_backward(cuda, 3, 2048, (BF16, BF16), form, without=("write",))
    assert not [name for name, *_ in cuda.launches() if "unit_backward" in name]
    emulated.check_norm_backward(cuda, 3, 2048, (BF16, BF16), form, 0, False, without=("read",))
    assert not [name for name, *_ in cuda.launches() if "unit_backward" in name]


def test_a_unit_of_256_rows_keeps_the_promise(cuda):
    """So many slots that no block of 256 rows is cut: the longest running sums that there are."""
    rows, slots = 700, 150
    form = make_form(rows, 64, 2, slots)
    form["slot"] = torch.zeros(rows, dtype=torch.int32)
    form["slot"][300:310] = torch.arange(-1, 9, dtype=torch.int32)
    for pair in ((F32, F32), (BF16, BF16)):
        emulated.check_edit_backward(cuda, rows, 64, pair, form)
        emulated.check_norm_backward(cuda, rows, 64, pair, form, 2, False)


@pytest.mark.parametrize("kib", [48, 227])
def test_bits_depend_on_neither_grid_nor_thread_order(cuda, kib):
    """With the shared memory of one architecture: it decides what a launch takes, and so how units are cut."""
    cuda.schedule(multiprocessors=5, shared_kib=kib)
    first = emulated.every_op(cuda, 70, 4104, BF16, slots=2)
    cuda.schedule(multiprocessors=132, seed=7, shared_kib=kib)
    again = emulated.every_op(cuda, 70, 4104, BF16, slots=2)
    assert not [name for name, t in first.items() if not emulated.same_bits(t, again[name])]
