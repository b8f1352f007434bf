"""The backwards of kernels/cuda over slots under the emulator: which rows a partial is of, and how partials are added."""

import emulated_cases as emulated
import pytest
import torch
from emulated_cases import BF16, F32, cuda, make_form, plain_schedule, pytestmark

harness, reference = emulated.harness, emulated.reference
__all__ = ["cuda", "plain_schedule", "pytestmark"]


def sizes(*counts):
    """(slots, each row's slot) of so many rows of each slot, one after another; the first count is that of slot −1."""
    return len(counts) - 1, torch.repeat_interleave(torch.arange(len(counts)) - 1, torch.tensor(counts)).to(torch.int32)


# Tiles have two rows of 16 bits. The cuts are those of 114 and of 132 multiprocessors, of 8 blocks each.
LAYOUTS = {
    "one slot": sizes(0, 300),
    "even": sizes(0, 100, 100, 100),
    "borders in tiles": sizes(3, 1, 2, 3, 5, 7, 64, 65, 257, 1, 9),
    "a row each": sizes(0, *[1] * 40),
    "empty slots": sizes(5, *[0] * 4, 30, 0, 0, 1, 77, 0),
    "more slots than rows": (60, torch.tensor([58, 3, -1, 3, 20, 59, 0], dtype=torch.int32)),
    "untouched": sizes(37, 0, 0),
    "beyond the bank": (3, torch.tensor([3, 0, 7, -1, 2, 0, 3] * 9, dtype=torch.int32)),
    "both kinds of cuts": sizes(1000, 9001, 0, 12007),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
without_large = pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "both kinds of cuts"])


def shuffled(layout):
    slots, slot = LAYOUTS[layout]
    return slots, slot[torch.randperm(len(slot))]


def pairwise(values):
    while len(values) > 1:
        values = torch.cat([values, torch.zeros_like(values[: len(values) % 2])])
        values = values[::2] + values[1::2]
    return values[0]


def running(rows):
    total = torch.zeros(8)
    for row in rows:
        total = total + row.float()
    return total


def in_lines(rows):
    """Eight running sums, pairwise."""
    return pairwise(torch.stack([running(rows[line::8]) for line in range(8)]))


def leaf_starts(rows, slots):
    """Of tiles of two rows; [(first row, leaf's number)]."""
    tiles, fewest = -(-rows // 2), max(2, min(8, rows // slots))
    starts = [[i * tiles // pieces * 2 for i in range(pieces)] for pieces in (min(8 * n, -(-rows // fewest)) for n in (114, 132))]
    if 10 * len(starts[1]) >= rows / 2:  # the bytes of a row over twice those of a partial
        return list(zip(starts[0], range(rows), strict=False))
    numbered = sorted(starts[0] + starts[1][1:])
    return [(start, i) for i, start in enumerate(numbered) if i + 1 == len(numbered) or numbered[i + 1] > start]


def by_leaves(values, slot, slots, starts, add):
    """Each slot's gradient: its rows of each leaf, added by `add`, and these pairwise by the leaves' numbers."""
    order = torch.argsort(torch.where((slot < 0) | (slot >= slots), -1, slot), stable=True).tolist()
    edges, found = [*(start for start, _ in starts), len(order)], []
    for s in range(slots):
        partials = {}
        for (begin, number), end in zip(starts, edges[1:], strict=True):
            mine = [row for row in order[begin:end] if slot[row] == s]
            if mine:
                partials[number] = add(values[mine])
        numbers = range(min(partials), max(partials) + 1) if partials else [0]
        found.append(pairwise(torch.stack([partials.get(n, torch.zeros(8)) for n in numbers])))
    return torch.stack(found)


def d_bias(cuda, grad, slot, slots, *also):
    form = {"bias": torch.zeros(slots, 8), "slot": slot} | ({"coefficient": torch.ones(len(slot))} if also else {})
    needs = [n in ("hidden", "bias", *also) for n in ("hidden", *harness.PARAMETERS, "coefficient")]
    return cuda.edit_backward(grad, None, None, form, None, None, needs, BF16, grad.shape)[2]


@layouts
def test_sums_of_whole_rows_are_a_slots_share_of_each_leaf(cuda, layout):
    """To the bit, on every number of multiprocessors: which block takes which rows changes nothing."""
    slots, slot = shuffled(layout)
    grad = torch.randn(len(slot), 8).to(BF16)
    expected = by_leaves(grad, slot, slots, leaf_starts(len(slot), slots), running)
    for sms in (1, 5, 114, 132):
        cuda.schedule(sms)
        assert torch.equal(d_bias(cuda, grad, slot, slots, "coefficient"), expected), sms
        assert any("unit_backward" in name for name, *_ in cuda.launches())


@layouts
def test_column_sums_are_a_slots_share_of_each_piece(cuda, layout):
    slots, slot = shuffled(layout)
    grad = torch.randn(len(slot), 8).to(BF16)
    piece = 256
    while piece >= 2 * max(8, min(64, len(slot) // slots)):  # one column tile: never 2048 blocks
        piece //= 2
    starts = list(zip(range(0, len(slot), piece), range(len(slot)), strict=False))
    got = d_bias(cuda, grad, slot, slots)
    assert any("column_sums" in name for name, *_ in cuda.launches())
    assert torch.equal(got, by_leaves(grad, slot, slots, starts, in_lines))


@without_large
@pytest.mark.parametrize("kib", [48, 227])
def test_every_gradient_over_slots(cuda, layout, kib):
    """48 KB leave d_read and d_write of rank 17 to later kernels; an odd view takes the scalar ones."""
    slots, slot = shuffled(layout)
    cuda.schedule(multiprocessors=5, shared_kib=kib)
    cases = [(64, 3, BF16, BF16, "plain"), (384, 17, BF16, F32, "plain"), (20, 9, F32, F32, "unaligned")]
    for width, rank, *pair, view in cases:
        form = make_form(len(slot), width, rank, slots, "rows")
        form["slot"] = slot
        emulated.check_edit_backward(cuda, len(slot), width, (pair[0], pair[0]), form, view=view)
        emulated.check_norm_backward(cuda, len(slot), width, pair, form, 2, True, view)


@without_large
def test_what_is_not_finite_stays_in_its_slot(cuda, layout):
    """Rows of one slot that are NaN or infinite, and untouched ones, leave the other slots' gradients as they were."""
    slots, slot = shuffled(layout)
    rows, width = len(slot), 64
    bad = next((s for s in (1, 0, 3, 2) if (slot == s).any()), -1)
    touched = (slot >= 0) & (slot < slots)
    form = make_form(rows, width, 3, slots, "rows")
    form["slot"] = slot
    grad, normed, out, x = (torch.randn(rows, width).to(BF16) for _ in range(4))
    rstd, grad_z, z, weight = torch.rand(rows), torch.randn(rows, 3), torch.randn(rows, 3), torch.rand(width).to(BF16)

    def gradients():
        return cuda.edit_add_norm_backward(
            grad, normed, out, x, None, weight, None, rstd, form, grad_z, z, False, 0,
            [True] * 8, (False, False), BF16, BF16, (rows, width),
        )[2:7] + cuda.edit_backward(grad, x, None, form, grad_z, z, [True] * 7, BF16, (rows, width))[1:6]  # fmt: skip

    before = gradients()
    for at in ((slot == bad) & touched, ~touched):
        for tensor in (grad, normed, out, x, grad_z, z):
            tensor[at] = torch.tensor([torch.nan, torch.inf, -torch.inf])[torch.randint(3, (int(at.sum()), 1))].to(tensor.dtype)
        rstd[at] = torch.inf
    others = torch.arange(slots) != bad
    for was, now in zip(before, gradients(), strict=True):
        assert emulated.same_bits(was[others], now[others])
    assert not (touched & (slot == bad)).any() or not torch.isfinite(now[bad]).all()


@pytest.mark.parametrize("layout", ["even", "borders in tiles", "untouched"])
def test_sums_of_all_slots_are_those_of_the_rows_in_the_slots_order(cuda, layout):
    """d_weight and d_norm_bias of whole rows do not know of slots."""
    slots, slot = shuffled(layout)
    rows, width = len(slot), 64
    normed, out, weight = (torch.randn(n, width).to(BF16) for n in (rows, rows, 1))
    mean, rstd, coefficient = torch.randn(rows), torch.rand(rows), torch.rand(rows)
    order = torch.argsort(torch.where((slot < 0) | (slot >= slots), -1, slot), stable=True)

    def sums(at, form):
        needs = [n in ("x", "bias", "coefficient") for n in ("x", *harness.PARAMETERS, "coefficient", "residual")]
        return cuda.edit_add_norm_backward(
            None, normed[at], out[at], None, None, weight[0], mean[at], rstd[at], form, None, None, False, 2,
            needs, (True, True), BF16, BF16, (rows, width),
        )[-2:]  # fmt: skip

    bias = torch.randn(slots, width)
    got = sums(torch.arange(rows), {"bias": bias, "slot": slot, "coefficient": coefficient})
    for a, b in zip(got, sums(order, {"bias": bias[0], "coefficient": coefficient[order]}), strict=True):
        assert emulated.same_bits(a, b)
