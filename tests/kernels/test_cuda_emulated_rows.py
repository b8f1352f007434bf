"""What holds for every op of kernels/cuda: bits, views, no rows, no columns. The emulator is emulated_cases.py's."""

import emulated_cases as emulated
import pytest
import torch
from emulated_cases import BF16, F32, PAIRS, cuda, make_form, plain_schedule, pytestmark, stream

harness, reference = emulated.harness, emulated.reference
__all__ = ["cuda", "plain_schedule", "pytestmark"]


@pytest.mark.parametrize(("rows", "width", "dtype"), [(300, 64, F32), (300, 64, BF16), (3, 1030, BF16)])
def test_bits_do_not_depend_on_the_order_of_threads_or_the_grid(cuda, rows, width, dtype):
    """A missing barrier shows in one of the orders, a sum that follows the launch in one of the grids."""
    first = emulated.every_op(cuda, rows, width, dtype)
    for multiprocessors, seed in [(3, 0), (3, 1), (132, 7), (1, 8)]:
        cuda.schedule(multiprocessors, seed)
        again = emulated.every_op(cuda, rows, width, dtype)
        assert not [name for name, t in first.items() if not emulated.same_bits(t, again[name])], (
            multiprocessors,
            seed,
        )


@pytest.mark.parametrize("width", [64, 100])
@pytest.mark.parametrize("rank", [0, 5])
def test_a_row_does_not_depend_on_the_others(cuda, width, rank):
    x, residual = stream(9, width, BF16), stream(9, width, BF16)
    form, weight = make_form(9, width, rank), torch.rand(width).to(BF16)
    whole = cuda.edit_add_norm(x, residual, weight, None, form, kind=2, want_z=rank > 0)
    d_whole = cuda.edit_backward(
        residual, x, None, form, None, None, [True] + [False] * 6, BF16, (9, width)
    )[0]  # fmt: skip
    for row in range(9):
        one = slice(row, row + 1)
        alone = cuda.edit_add_norm(x[one], residual[one], weight, None, form, kind=2, want_z=rank > 0)
        assert all(emulated.same_bits(a, None if b is None else b[one]) for a, b in zip(alone, whole, strict=True))
        d_alone = cuda.edit_backward(
            residual[one], x[one], None, form, None, None, [True] + [False] * 6, BF16, (1, width)
        )[0]  # fmt: skip
        assert emulated.same_bits(d_alone, d_whole[one])


def test_views_slide_across_every_alignment(cuda):
    width, form = 64, make_form(5, 64, 2)
    for start in range(9):
        rows = torch.randn(5 * 72 + 16).to(BF16)[start : start + 5 * 72].view(5, 72)[:, :width]
        for cuda.shift in (0, start % 3):
            emulated.check_edit(cuda, rows, form)
            emulated.check_edit(cuda, rows, make_form(5, width, 0, None, "rows"))
            emulated.check_edit_add_norm(cuda, rows, rows, form, 0, False)
            emulated.check_edit_backward(cuda, 5, width, (BF16, BF16), form)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("slots", [None, 2])
def test_no_rows(cuda, rank, slots):
    form = make_form(0, 64, rank, slots, "rows")
    x = torch.empty(0, 64, dtype=BF16)
    z = torch.empty(0, rank) if rank else None
    assert cuda.edit(x, form, rank > 0)[0].shape == (0, 64)
    cuda.edit_add_norm(x, x, torch.rand(64).to(BF16), None, form, want_z=rank > 0)
    needs = [n == "hidden" or form.get(n) is not None for n in ("hidden", *harness.PARAMETERS, "coefficient")]
    got = cuda.edit_backward(x, x, None, form, None, z, needs, BF16, (0, 64))
    assert not any(t.any() for t in got if t is not None)


@pytest.mark.parametrize("address", [None, 0, 4], ids=["null", "aligned", "unaligned"])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("slots", [None, 2])
def test_no_columns(cuda, monkeypatch, address, rank, slots):
    """z, the statistics, d_offset and d_coefficient exist all the same; empty tensors may have an address."""
    rows, guard = 5, torch.full((64,), torch.nan)
    if address is not None:
        at = guard.data_ptr() + address
        real = harness.pointer
        monkeypatch.setattr(harness, "pointer", lambda t: None if t is None else real(t) or at)
        monkeypatch.setattr(harness, "stride", lambda t: 0 if t is None else t.stride(0) if t.numel() else 0)
    form = make_form(rows, 0, rank, slots, "rows")
    exact = emulated.reference_form(form, torch.float64)
    z = reference.edit(torch.empty(rows, 0).double(), *exact, rank > 0)[1]
    for narrow, wide in PAIRS:
        x, residual = stream(rows, 0, narrow), stream(rows, 0, wide)
        emulated.check_edit(cuda, x, form)
        assert rank == 0 or torch.equal(cuda.edit_add(x, residual, form, False, True)[1].double(), z)
        for kind in (0, 1, 2):
            normed, got, mean, rstd = cuda.edit_add_norm(
                x, residual, residual[0], None, form, True, kind, want_z=rank > 0
            )[1:]
            assert normed.shape == (rows, 0) and (got is None or torch.equal(got.double(), z))
            assert rstd.isnan().all() and (mean is None or mean.isnan().all())  # means over no columns
            emulated.check_norm_backward(cuda, rows, 0, (narrow, wide), form, kind, kind == 1)
        emulated.check_edit_backward(cuda, rows, 0, (narrow, wide), form)
        emulated.check_edit_backward(cuda, rows, 0, (narrow, wide), form, without=("coefficient",))
        if rank and slots is None:
            got = cuda.project(x, form["read"], form["offset"])
            assert torch.equal(got, form["offset"].expand(rows, rank))
            grad_z = torch.randn(rows, rank)
            got = cuda.project_backward(grad_z, x, form["read"], (True, True, True), narrow, 0)
            exact_back = reference.project_backward(
                *emulated.double((grad_z, x, form["read"])), (True, True, True), torch.float64
            )
            emulated.assert_all("d_hidden d_read d_offset", got, exact_back, [t.to(F32) for t in exact_back])
    assert guard.isnan().all()


def test_unknown_dtypes_are_refused(cuda):
    x, out = torch.randn(3, 64), torch.zeros(3, 64)
    args = harness.EditArgs(3, 64, cuda.form({}), 7, x.data_ptr(), 64, out.data_ptr(), None)
    assert cuda.library.edit(harness.ctypes.byref(args)) == 1
    assert not out.any()


def test_rows_further_apart_than_32_bits_count(cuda):
    """Two rows 2^31 elements apart, of which only these two are ever touched."""
    width, step = 512, 2**31 + 8
    far = torch.empty(step + width, dtype=BF16).as_strided((2, width), (step, 1))
    near, form, weight = stream(2, width, BF16), make_form(2, width), torch.rand(width).to(BF16)
    far.copy_(near)
    z = torch.randn(2, 4)
    low = {n: torch.randn(4, width) / 8 for n in ("read", "write")} | {"offset": torch.randn(4)}
    needs = [True, True, True, *[False] * 4]
    for given in (form, form | low):
        results = [
            (
                cuda.edit(x, given)[0], cuda.edit_add(near, x, given)[0], *cuda.edit_add_norm(x, x, weight, None, given)[:2],
                *cuda.edit_backward(x, x, None, given, None, z if given is not form else None, needs, BF16, (2, width))[:3],
            )
            for x in (near, far)
        ]  # fmt: skip
        assert all(emulated.same_bits(a, b) for a, b in zip(*results, strict=True))


def test_a_refused_attribute_does_not_fail_the_next_launch(cuda):
    assert cuda.library.refused_then_good(harness.PTR(torch.zeros(64).data_ptr())) == 0


def test_a_load_outside_the_arguments_fails(cuda):
    x, bias = stream(3, 512, BF16), torch.randn(512)
    cuda.edit(x, {"bias": bias})
    with pytest.raises(AssertionError, match="a load outside the arguments"):
        cuda.edit(x, {"bias": bias[:504]})
    cuda.edit(x, {"bias": bias})
