"""The gradients of kernels/cuda under the emulator; cases and promise are in emulated_cases.py."""

import emulated_cases as emulated
import pytest
import torch
from emulated_cases import BF16, F32, PAIRS, SIZES, cuda, make_form, plain_schedule, pytestmark

harness = emulated.harness
__all__ = ["cuda", "plain_schedule", "pytestmark"]


@pytest.mark.parametrize("pair", PAIRS, ids=emulated.names)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_edit_backward(cuda, size, pair):
    rows, width = size
    emulated.check_edit_backward(cuda, rows, width, pair, make_form(rows, width))
    emulated.check_edit_backward(cuda, rows, width, pair, make_form(rows, width, 4), on_sum=True, view="strided")
    cuda.shift = 1
    emulated.check_edit_backward(cuda, rows, width, pair, make_form(rows, width, 3, 2, "rows"), view="unaligned")


@pytest.mark.parametrize("rank", emulated.RANKS)
@pytest.mark.parametrize("slots", [None, 1, 3])
def test_edit_backward_slots_and_coefficients(cuda, rank, slots):
    rows, width = 523, 64
    for coefficient in ("rows", "shared", None):
        form = make_form(rows, width, rank, slots, coefficient)
        emulated.check_edit_backward(cuda, rows, width, (BF16, BF16), form)
        emulated.check_edit_backward(cuda, rows, width, (F32, F32), form, on_sum=True, without=("coefficient",))


@pytest.mark.parametrize(
    "without",
    [
        ("hidden",), ("scale", "coefficient"), ("bias", "coefficient", "read"), ("grad",), ("grad", "grad_z"),
        ("write", "coefficient"), ("grad_z", "offset"),
        ("scale", "bias", "read", "offset", "write", "coefficient"),
        ("hidden", "scale", "bias", "offset", "write", "coefficient"),
        ("hidden", "scale", "bias", "read", "write", "coefficient"),
        ("hidden", "scale", "bias", "read", "offset", "coefficient"),
    ],
    ids="-".join,
)  # fmt: skip
@pytest.mark.parametrize("rank", [0, 9])
def test_edit_backward_of_what_is_wanted(cuda, without, rank):
    rows, width = 70, 72
    for slots in (None, 2):
        form = make_form(rows, width, rank, slots, "rows")
        emulated.check_edit_backward(cuda, rows, width, (BF16, BF16), form, without=without)
    probe = make_form(rows, width, rank, None, None, "offset")
    emulated.check_edit_backward(cuda, rows, width, (BF16, BF16), probe, without=without)


@pytest.mark.parametrize("pair", PAIRS, ids=emulated.names)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", [0, 1, 2], ids=["rms", "gemma", "layer"])
def test_edit_add_norm_backward(cuda, size, pair, kind):
    rows, width = size
    emulated.check_norm_backward(cuda, rows, width, pair, make_form(rows, width), kind, False)
    emulated.check_norm_backward(cuda, rows, width, pair, make_form(rows, width, 4, None, "rows"), kind, True)
    cuda.shift = 1
    emulated.check_norm_backward(
        cuda, rows, width, pair, make_form(rows, width, 3, 2, "rows"), kind, kind == 1, "unaligned"
    )


@pytest.mark.parametrize(
    "without",
    [
        ("grad_residual",), ("grad_normed",), ("weight",), ("x", "coefficient"), ("residual",),
        ("scale", "bias", "read", "offset", "write", "coefficient", "weight"),
        ("x", "residual", "scale", "bias", "read", "offset", "coefficient"),
        ("x", "residual", "scale", "bias", "read", "offset", "write", "coefficient"),
    ],
    ids="-".join,
)  # fmt: skip
def test_edit_add_norm_backward_of_what_is_wanted(cuda, without):
    rows, width = 300, 64
    for rank, slots, on_sum, kind in [(0, None, False, 0), (0, 3, True, 2), (9, 3, False, 2)]:
        form = make_form(rows, width, rank, slots, "rows")
        emulated.check_norm_backward(cuda, rows, width, (BF16, BF16), form, kind, on_sum, without=without)


@pytest.mark.parametrize("size", [(3, 4104), (2, 8192), (2, 8200)], ids=str)
def test_wide_gradients(cuda, size):
    for pair in ((F32, F32), (BF16, BF16)):
        emulated.check_edit_backward(cuda, *size, pair, make_form(*size, 2, None, "rows"))
        emulated.check_norm_backward(cuda, *size, pair, make_form(*size, 2, None, "rows"), 2, True)


def pairwise(values):
    """The pairwise tree over the first dimension, padded with zeros to a power of two."""
    while len(values) > 1:
        values = torch.cat([values, torch.zeros_like(values[: len(values) % 2])])
        values = values[::2] + values[1::2]
    return values[0]


@pytest.mark.parametrize("units", [1, 7, 8, 9, 37, 150])
def test_column_sums_follow_the_tree_that_is_promised(cuda, units):
    """To the bit: eight running sums of a block's rows, pairwise, and the blocks pairwise."""
    grad = torch.randn(64 * units - 59, 8)
    form, needs = (
        {"bias": torch.zeros(8)},
        [n == "bias" for n in ("hidden", *harness.PARAMETERS, "coefficient")],
    )
    for cuda_sms in (1, 132):
        cuda.schedule(cuda_sms)
        got = cuda.edit_backward(grad, None, None, form, None, None, needs, F32, grad.shape)[2]
        partials = []
        for rows in grad.split(64):
            lines = [torch.zeros(8)] * 8
            for i, row in enumerate(rows):
                lines[i % 8] = lines[i % 8] + row
            partials.append(pairwise(torch.stack(lines)))
        assert torch.equal(got, pairwise(torch.stack(partials)))


def starts(rows, pieces):
    return [i * rows // pieces for i in range(pieces)]


@pytest.mark.parametrize("rows", [1, 9, 300, 10600], ids=str)
def test_sums_of_whole_rows_follow_the_cuts_of_both_chips_on_every_chip(cuda, rows):
    """To the bit: leaves between the cuts for 114 and for 132 multiprocessors, whatever the number that there is."""
    grad, form = torch.randn(rows, 8), {"bias": torch.zeros(8), "coefficient": torch.ones(rows)}
    needs = [n in ("hidden", "bias", "coefficient") for n in ("hidden", *harness.PARAMETERS, "coefficient")]
    cuts = [starts(rows, min(8 * sms, -(-rows // 8))) for sms in (114, 132)]  # eight blocks of a warp at once
    assert (cuts[0] == cuts[1]) == (rows < 10600)
    numbered = sorted(cuts[0] + (cuts[1][1:] if cuts[0] != cuts[1] else []))
    leaves = [torch.zeros(8) for _ in numbered]
    for leaf, (begin, end) in enumerate(zip(numbered, [*numbered[1:], rows], strict=True)):
        for row in grad[begin:end]:
            leaves[leaf] = leaves[leaf] + row
    for sms in (1, 5, 114, 132):
        cuda.schedule(sms)
        got = cuda.edit_backward(grad, None, None, form, None, None, needs, F32, grad.shape)[2]
        assert torch.equal(got, pairwise(torch.stack(leaves))), sms
