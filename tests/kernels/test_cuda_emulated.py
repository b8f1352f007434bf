"""The emulator itself, and the forward ops of kernels/cuda under it; cases and promise are in emulated_cases.py."""

import emulated_cases as emulated
import pytest
import torch
from emulated_cases import BF16, F32, HALF, PAIRS, SIZES, cuda, make_form, plain_schedule, pytestmark, stream

harness, reference = emulated.harness, emulated.reference
__all__ = ["cuda", "plain_schedule", "pytestmark"]


# The emulator itself


@pytest.mark.parametrize(
    ("rule", "message"),
    [(0, "barrier"), (1, "barrier"), (2, "shuffle"), (3, "past the shared memory"), (4, "misaligned")],
)
def test_emulator_reports_a_broken_rule(cuda, rule, message):
    out = torch.zeros(64)
    assert cuda.library.break_rule(rule, harness.PTR(out.data_ptr())) != 0
    assert message in cuda.library.emulator_message().decode()
    cuda.edit(torch.randn(3, 64), {})  # and goes on


def test_emulator_shows_a_race_as_a_result_that_depends_on_the_order(cuda):
    results = []
    for seed in (0, 1):
        out = torch.zeros(64)
        cuda.schedule(seed=seed)
        assert cuda.library.break_rule(5, harness.PTR(out.data_ptr())) == 0
        results.append(out)
    assert not torch.equal(*results)


def test_emulator_rounds_as_torch_does(cuda):
    values = torch.cat([torch.randn(4096) * 2.0**e for e in range(-40, 40, 2)])
    values = torch.cat([values, torch.tensor([0.0, -0.0, 65519.9, 65520.0, 3e38, torch.inf, -torch.inf])])
    for narrow in (BF16, HALF):
        x = values.to(narrow)[None]
        zero = torch.zeros(1, values.numel())
        out, _ = cuda.edit_add(x, zero, {})  # narrow → fp32
        assert torch.equal(out, x.float())
        odd = torch.full_like(x, 0.37)
        finite = x.isfinite() & ((x.float() + odd.float()).abs() < 3e38)
        out, _ = cuda.edit_add(x, odd, {})  # fp32 → narrow
        assert torch.equal(out[finite], (x + odd)[finite])


@pytest.mark.parametrize("dtype", [F32, BF16, HALF], ids=emulated.names)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("view", ["plain", "strided", "unaligned"])
def test_edit(cuda, size, dtype, view):
    rows, width = size
    cuda.shift = view == "unaligned"
    for rank in (0, 4):
        emulated.check_edit(cuda, stream(rows, width, dtype, view), make_form(rows, width, rank))


@pytest.mark.parametrize("rank", emulated.RANKS)
@pytest.mark.parametrize("dtype", [F32, BF16, HALF], ids=emulated.names)
def test_edit_slots_and_coefficients(cuda, rank, dtype):
    rows, width = 43, 384
    hidden = stream(rows, width, dtype)
    for slots in (None, 1, 3):
        for coefficient in ("rows", "shared", None):
            emulated.check_edit(cuda, hidden, make_form(rows, width, rank, slots, coefficient))
    for kept in ("scale", "bias", "write", "scale offset", ""):
        emulated.check_edit(cuda, hidden, make_form(rows, width, rank, None, "rows", kept))


@pytest.mark.parametrize("size", emulated.WIDE, ids=str)
def test_wide_rows(cuda, size):
    rows, width = size
    for narrow, wide in PAIRS:
        x, residual = stream(rows, width, narrow), stream(rows, width, wide)
        emulated.check_edit_add_norm(cuda, x, residual, make_form(rows, width), 0, False)
        emulated.check_edit_add_norm(cuda, x, residual, make_form(rows, width, 2, None, "rows"), 2, True)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("width", [64, 65])
def test_untouched_rows_keep_their_bits(cuda, rank, width):
    """NaN payloads, negative zeros and subnormals too, whatever the parameters hold."""
    for dtype, bits in ((F32, torch.int32), (BF16, torch.int16), (HALF, torch.int16)):
        info = torch.iinfo(bits)
        hidden = torch.randint(info.min, info.max, (40, width), dtype=bits).view(dtype)
        form = make_form(40, width, rank, 2, "rows")
        form["slot"] = torch.tensor([-1, 2, 1000, -7] * 10, dtype=torch.int32)
        form["slot"][:6], form["coefficient"][:6] = 0, 0
        form["bias"][:] = torch.nan
        out, z = cuda.edit(hidden, form, want_z=rank > 0)
        assert emulated.same_bits(out, hidden)
        assert rank == 0 or not z[6:].any()
        if dtype == F32:
            continue
        hidden = torch.randn(40, width).to(dtype)
        residual = torch.randn(40, width).to(dtype)
        for on_sum in (False, True):
            assert torch.equal(cuda.edit_add(hidden, residual, form, on_sum)[0], residual + hidden)


@pytest.mark.parametrize("pair", PAIRS, ids=emulated.names)
@pytest.mark.parametrize("width", [384, 1030])
def test_identity_is_the_unedited(cuda, pair, width):
    x, residual = stream(33, width, pair[0]), stream(33, width, pair[1])
    for form in (make_form(33, width), {}):
        if form:
            form["scale"][:], form["bias"][:] = 1, 0
        assert torch.equal(cuda.edit(x, form)[0], x)
        for on_sum in (False, True):
            assert torch.equal(cuda.edit_add(x, residual, form, on_sum)[0], residual + x)


# edit_add and edit_add_norm


@pytest.mark.parametrize("pair", PAIRS, ids=emulated.names)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("view", ["plain", "strided", "unaligned"])
def test_edit_add(cuda, size, pair, view):
    rows, width = size
    cuda.shift = view == "unaligned"
    x, residual = stream(rows, width, pair[0], view), stream(rows, width, pair[1], view)
    for rank, slots, coefficient, on_sum in [
        (0, None, None, False),
        (0, 2, "rows", True),
        (4, None, "shared", True),
    ]:
        form = make_form(rows, width, rank, slots, coefficient)
        got = cuda.edit_add(x, residual, form, on_sum, rank > 0)
        eager = reference.edit_add(x, residual, *emulated.reference_form(form, F32), on_sum, rank > 0)
        exact = reference.edit_add(
            *emulated.double((x, residual)), *emulated.reference_form(form, torch.float64), on_sum, rank > 0
        )
        emulated.assert_all("out z", got, exact, eager)


@pytest.mark.parametrize("pair", PAIRS, ids=emulated.names)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", [0, 1, 2], ids=["rms", "gemma", "layer"])
def test_edit_add_norm(cuda, size, pair, kind):
    rows, width = size
    if width == 1 and kind == 2:
        pytest.skip("a row of one column has no deviation")
    x, residual = stream(rows, width, pair[0], "strided"), stream(rows, width, pair[1])
    emulated.check_edit_add_norm(cuda, x, residual, make_form(rows, width), kind, False)
    emulated.check_edit_add_norm(cuda, x, residual, make_form(rows, width, 0, 3, "rows"), kind, True, affine=False)
    emulated.check_edit_add_norm(cuda, x, residual, make_form(rows, width, 3, 2, "rows"), kind, False)
    cuda.shift = 1
    x = stream(rows, width, pair[0], "unaligned")
    emulated.check_edit_add_norm(cuda, x, residual, make_form(rows, width, 5), kind, True)


# project


@pytest.mark.parametrize("rank", [1, 4, 17, 64])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_project(cuda, size, rank):
    rows, width = size
    for dtype in (F32, BF16, HALF):
        hidden, grad_z = stream(rows, width, dtype, "strided"), torch.randn(rows, rank)
        form = make_form(rows, width, rank)
        read, offset = form["read"], form["offset"]
        got = cuda.project(hidden, read, offset)
        emulated.assert_promise(
            "z",
            got,
            reference.project(*emulated.double((hidden, read, offset))),
            reference.project(hidden, read, offset),
        )
        assert emulated.same_bits(cuda.edit(hidden, form, want_z=True)[1], got)
        for needs in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
            given = hidden if needs[1] else None
            got = cuda.project_backward(grad_z, given, read if needs[0] else None, needs, dtype, width)
            eager = reference.project_backward(grad_z, hidden, read, needs, dtype)
            exact = reference.project_backward(*emulated.double((grad_z, hidden, read)), needs, torch.float64)
            h = hidden.double().abs()
            largest = (None, grad_z.double().abs().T @ h, grad_z.double().abs().sum(0))
            emulated.assert_all("d_hidden d_read d_offset", got, exact, eager, largest)
