"""What the Triton ops promise exactly, and their edges, under Triton's interpreter.

Not collected by name: test_triton_interpreter.py runs it with TRITON_INTERPRET=1.
"""

import math

import pytest
import torch
from fastedit.kernels import triton as backend
from fastedit.kernels.triton.reduce import reduce_partials
from triton.runtime.interpreter import GridExecutor
from triton_support import (
    BF16,
    F16,
    F32,
    NAMES,
    RMS,
    all_needs,
    assert_same,
    make_form,
    poisoned_memory,  # noqa: F401, for every test here
    view,
)  # fmt: skip

# --- exact promises -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["f32", "bf16", "f16"])
def test_identity_edit_is_the_unedited(dtype):
    h, residual = view(33, 100, dtype, True), view(33, 100, dtype, True)
    identity = (torch.ones(100), torch.zeros(100), None, None, None, None, None)
    assert torch.equal(backend.edit(h, *identity)[0], h)
    assert torch.equal(backend.edit(h, *[None] * 7)[0], h)
    for on_sum in (False, True):
        assert torch.equal(backend.edit_add(h, residual, *identity, on_sum)[0], residual + h)
        out, *_ = backend.edit_add_norm(h, residual, h[0].clone(), None, *identity, on_sum)
        assert torch.equal(out, residual + h)
    assert not torch.equal(backend.edit(h, torch.full((100,), 1.01), *identity[1:])[0], h)


@pytest.mark.parametrize("rank", [0, 4, 17])
@pytest.mark.parametrize("by", ["slot", "coefficient"])
def test_untouched_rows_keep_their_bits(rank, by):
    """Also where the parameters are infinite and the row is not a number."""
    rows, width = 7, 100
    h, residual = view(rows, width, BF16, True), view(rows, width, BF16, True)
    h[2, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    form = list(make_form(rows, width, rank, 2 if by == "slot" else 0, "none"))
    untouched = torch.tensor([False, True, True, False, True, False, False])
    if by == "slot":
        form[5] = torch.tensor([0, -1, 2, 1, -(2**31), 0, 1], dtype=torch.int32)
        form[0][0, 5] = float("inf")
    else:
        form[6] = torch.where(untouched, 0.0, 0.7)
        form[0][5] = float("inf")
    out, z = backend.edit(h, *form, True)
    assert torch.equal(out[untouched].view(torch.int16), h[untouched].view(torch.int16))
    assert not torch.equal(out[0], h[0])
    if rank and by == "slot":
        assert (z[untouched] == 0).all() and (z[~untouched] != 0).all()
    plain = residual + h
    for on_sum in (False, True):
        added = backend.edit_add(h, residual, *form, on_sum)[0]
        assert torch.equal(added[untouched].nan_to_num(9.0), plain[untouched].nan_to_num(9.0))
        assert not torch.equal(added[0], plain[0])


@pytest.mark.parametrize("rank", [0, 4, 17])
def test_a_coefficient_of_one_is_the_edit_itself(rank):
    """Not h + 1 · update, whose last bits differ."""
    h, form = view(9, 100, F32, False), make_form(9, 100, rank, 0, "none")
    whole = backend.edit(h, *form)[0]
    assert torch.equal(backend.edit(h, *form[:6], torch.ones(1))[0], whole)
    assert torch.equal(backend.edit(h, *form[:6], torch.ones(9))[0], whole)
    assert not torch.equal(backend.edit(h, *form[:6], torch.full((9,), 0.5))[0], whole)


@pytest.mark.parametrize("rank, slots", [(0, 0), (4, 0), (17, 0), (4, 3)])
def test_the_same_bits_every_run_and_whatever_the_other_rows(rank, slots):
    rows, width = (300 if rank == 0 else 40), 64
    form = make_form(rows, width, rank, slots, "rows")
    h, residual, weight, grad = (view(n, width, BF16, False) for n in (rows, rows, 1, rows))
    z = torch.randn(rows, rank) if rank else None

    def run(n):
        cut = lambda t: None if t is None else t[:n]  # noqa: E731
        f = (*form[:5], cut(form[5]), cut(form[6]))
        out, normed, found_z, _, rstd = backend.edit_add_norm(
            h[:n], residual[:n], weight[0], None, *f, False, RMS, 1e-6, True
        )
        grads = backend.edit_add_norm_backward(
            None, grad[:n], out, h[:n], None, weight[0], None, rstd, *f, None, cut(z), False, RMS,
            (*all_needs(form), True), (True, False), BF16, BF16,
        )  # fmt: skip
        return [backend.edit(h[:n], *f)[0], out, normed, found_z, rstd, *grads[:2], grads[7]], grads[2:]

    (a_rows, a_sums), (b_rows, b_sums), (few_rows, _) = run(rows), run(rows), run(9)
    for a, b, few in zip(a_rows, b_rows, few_rows, strict=True):
        assert a is b is few is None or (torch.equal(a, b) and torch.equal(a[:9], few))
    for a, b in zip(a_sums, b_sums, strict=True):
        assert a is b is None or torch.equal(a, b)


# --- edges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank, slots", [(0, 0), (4, 2), (17, 0)])
def test_no_rows(rank, slots):
    x, form = torch.empty(0, 64, dtype=BF16), make_form(0, 64, rank, slots, "rows")
    weight = torch.ones(64, dtype=BF16)
    assert backend.edit(x, *form)[0].shape == (0, 64)
    assert backend.edit_add(x, x, *form)[0].shape == (0, 64)
    out, normed, z, mean, rstd = backend.edit_add_norm(x, x, weight, None, *form, False, RMS, 1e-6, True)
    assert normed.shape == (0, 64) and rstd.shape == (0,) and mean is None
    found = backend.edit_backward(x, x, None, *form, None, z, all_needs(form), BF16)
    assert found[0].shape == (0, 64) and found[6].shape == (0,)
    for gradient, parameter in zip(found[1:6], form[:5], strict=True):
        assert gradient is parameter is None or torch.equal(gradient, torch.zeros_like(parameter))
    _, _, *found = backend.edit_add_norm_backward(
        x, x, out, x, None, weight, None, rstd, *form, None, z, False, RMS, (*all_needs(form), True),
        (True, False), BF16, BF16,
    )  # fmt: skip
    assert torch.equal(found[6], torch.zeros(64))


def test_only_what_is_needed_and_the_same_bits_alone():
    rows, width, rank = 9, 64, 4
    h, grad, form = (
        view(rows, width, BF16, False),
        view(rows, width, BF16, False),
        make_form(rows, width, rank, 2, "rows"),
    )
    z = backend.edit(h, *form, True)[1]
    together = backend.edit_backward(grad, h, None, *form, None, z, (True,) * 7, BF16)
    for i, name in enumerate(NAMES):
        needs = tuple(j == i for j in range(7))
        reads_hidden = name in ("scale", "read", "coefficient")
        reads_z = name in ("write", "coefficient")
        alone = backend.edit_backward(
            grad, h if reads_hidden else None, None, *form, None, z if reads_z else None, needs, BF16
        )
        assert [g is not None for g in alone] == list(needs), name
        assert torch.equal(alone[i], together[i]), name


@pytest.mark.parametrize("slots", [0, 2])
def test_an_absent_gradient_is_zero(slots):
    rows, width, rank = 9, 64, 4
    x, residual, grad = (view(rows, width, F32, False) for _ in range(3))
    form, weight, grad_z = (
        make_form(rows, width, rank, slots, "rows"),
        torch.rand(width),
        torch.randn(rows, rank),
    )
    out, _, z, _, rstd = backend.edit_add_norm(x, residual, weight, None, *form, False, RMS, 1e-6, True)

    def edit(grad, grad_z):
        return backend.edit_backward(grad, x, None, *form, grad_z, z, all_needs(form), F32)

    def edit_add_norm(grad_residual, grad_normed):
        return backend.edit_add_norm_backward(
            grad_residual, grad_normed, out, x, None, weight, None, rstd, *form, grad_z, z, False, RMS,
            (*all_needs(form), True), (False, False), F32, F32,
        )  # fmt: skip

    zero = torch.zeros_like(grad)
    assert_same(edit(None, grad_z), edit(zero, grad_z))
    assert_same(edit(grad, None), edit(grad, torch.zeros_like(grad_z)))
    assert_same(edit_add_norm(None, grad), edit_add_norm(zero, grad))
    assert_same(edit_add_norm(grad, None), edit_add_norm(grad, zero))
    assert_same(edit_add_norm(None, None), edit_add_norm(zero, zero))
    assert edit_add_norm(None, grad)[0].abs().max() > 0.1


@pytest.mark.parametrize("part", [0, 1, 3, 4], ids=["scale", "bias", "offset", "write"])
@pytest.mark.parametrize("rank", [4, 17])
def test_an_absent_part_is_neutral(part, rank):
    rows, width = 9, 100
    h, grad, form = (
        view(rows, width, BF16, False),
        view(rows, width, BF16, False),
        make_form(rows, width, rank, 0, "rows"),
    )
    neutral, absent, grad_z = list(form), list(form), torch.randn(rows, rank)
    neutral[part] = torch.ones_like(form[part]) if part == 0 else torch.zeros_like(form[part])
    absent[part] = None
    found, expected = backend.edit(h, *absent, True), backend.edit(h, *neutral, True)
    assert_same(found, expected)
    needs = [True] * 7
    needs[part + 1] = False
    if part == 4:
        needs[3] = False  # without write, d_read is that of z alone: the same, but through another kernel
    assert_same(
        backend.edit_backward(grad, h, None, *absent, grad_z, found[1], needs, BF16),
        backend.edit_backward(grad, h, None, *neutral, grad_z, found[1], needs, BF16),
    )


def test_gradients_that_are_not_contiguous():
    h, form = view(9, 64, F32, False), make_form(9, 64, 4, 0, "none")
    z = backend.edit(h, *form, True)[1]
    for grad in (torch.ones(1, 1).expand(9, 64), torch.randn(64, 9).T, torch.randn(1, 64).expand(9, 64)):
        found = backend.edit_backward(grad, h, None, *form, None, z, all_needs(form), F32)
        same = backend.edit_backward(grad.contiguous(), h, None, *form, None, z, all_needs(form), F32)
        assert_same(found, same)


@pytest.mark.parametrize("rank, slots", [(0, 0), (4, 2), (17, 0)])
def test_nothing_is_written_beside_the_outputs(rank, slots, monkeypatch):
    """Every tensor that the ops allocate lies between guards; 7 rows of 100 columns fill no block or tile."""
    buffers, plain_empty, guard = [], torch.empty, 4096

    def guarded_empty(*shape, dtype=F32, device=None):
        shape = shape[0] if isinstance(shape[0], tuple | torch.Size) else shape
        count = math.prod(shape)
        buffer = plain_empty(count + 2 * guard, dtype=dtype).fill_(77)
        buffers.append((buffer, count))
        return buffer[guard : guard + count].view(shape)

    x, residual = view(7, 100, BF16, True), view(7, 100, BF16, True)
    form, weight = make_form(7, 100, rank, slots, "rows"), torch.rand(100).to(BF16)
    monkeypatch.setattr(torch, "empty", guarded_empty)
    monkeypatch.setattr(torch, "empty_like", lambda t: guarded_empty(t.shape, dtype=t.dtype))
    norm = (weight, weight)
    out, normed, z, mean, rstd = backend.edit_add_norm(x, residual, *norm, *form, False, 2, 1e-6, True)
    backend.edit(x, *form, True)
    args = (x, normed, out, x, None, weight, mean, rstd, *form, None, z, False, 2)
    backend.edit_add_norm_backward(*args, (*all_needs(form), True), (True, True), BF16, BF16)
    if rank:
        backend.project(x, *(p[0] if slots else p for p in form[2:4]))
    assert len(buffers) > 8
    for buffer, count in buffers:
        assert (buffer[:guard] == 77).all() and (buffer[guard + count :] == 77).all()


def test_offsets_beyond_32_bits():
    """Five rows 2^29 + 8 elements apart: the stride fits 32 bits, the last row's offset does not."""
    torch.use_deterministic_algorithms(False)  # or 4 GB would be filled; untouched pages take no memory
    stride = 2**29 + 8
    h = torch.empty(4 * stride + 64, dtype=BF16).as_strided((5, 64), (stride, 1))
    h.copy_(torch.randn(5, 64))
    near = h.contiguous()
    for rank in (0, 1, 17):
        form = make_form(5, 64, rank, 0, "none")
        assert torch.equal(backend.edit(h, *form)[0], backend.edit(near, *form)[0])


def tree(values):
    """The pairwise tree over the first dimension, padded with zeros to a power of two."""
    count = 1 << max(0, len(values) - 1).bit_length()
    values = torch.cat((values, values.new_zeros(count - len(values), *values.shape[1:])))
    while len(values) > 1:
        values = values[0::2] + values[1::2]
    return values[0]


@pytest.mark.parametrize("blocks", [1, 2, 15, 16, 17, 33, 48, 113])
def test_partials_are_added_as_one_fixed_tree(blocks):
    partials = torch.randn(blocks, 70) * torch.randn(blocks, 70).exp()
    assert torch.equal(reduce_partials(partials)[0], tree(partials))


def test_partials_of_slots_are_added_apart():
    partials = torch.randn(40, 70)
    first = torch.tensor([0, 17, 17, 18, 35], dtype=torch.int32)
    found = reduce_partials(partials, first)
    for slot in range(4):
        own = partials[first[slot] : first[slot + 1]]
        assert torch.equal(found[slot], tree(own) if len(own) else torch.zeros(70))


@pytest.mark.parametrize("slots", [0, 2])
def test_column_sums_are_partials_of_256_rows_and_the_tree(slots):
    """Sums of small integers are exact, so a row counted twice, or not at all, shows in every digit."""
    rows, width = 700, 64
    grad = torch.randint(-4, 5, (rows, width)).float()
    slot = torch.randint(-1, slots, (rows,), dtype=torch.int32) if slots else None
    form = (None, torch.zeros(*((slots,) if slots else ()), width), None, None, None, slot, None)
    found = backend.edit_backward(
        grad, None, None, *form, None, None, (False, False, True, *[False] * 4), F32
    )[2]
    if slots:
        assert torch.equal(found, torch.stack([grad[slot == s].sum(0) for s in range(slots)]))
    else:
        assert torch.equal(found, grad.sum(0))


# --- launches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 4])
def test_launches_of_an_op(rank, monkeypatch):
    """One forward. Backward one over the rows, one more that adds all partials, and before them one for q or the norm."""
    rows, width, launched = 300, 64, []
    real = GridExecutor.__call__
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *a, **k: launched.append(self.fn.__name__) or real(self, *a, **k))

    def launches(call):
        launched.clear()
        result = call()
        return len(launched), result

    form = make_form(rows, width, rank, 0, "none")
    h, residual, weight = view(rows, width, BF16, False), view(rows, width, BF16, False), torch.ones(width, dtype=BF16)
    assert launches(lambda: backend.edit(h, *form, rank > 0))[0] == 1
    assert launches(lambda: backend.edit_add(h, residual, *form, False, rank > 0))[0] == 1
    count, (out, _, z, _, rstd) = launches(
        lambda: backend.edit_add_norm(h, residual, weight, None, *form, False, RMS, 1e-6, rank > 0)
    )
    assert count == 1
    wanted = [True, *(p is not None for p in form[:5]), False]
    assert launches(lambda: backend.edit_backward(h, h, None, *form, None, z, wanted, BF16))[0] == 2 + (rank > 0)
    only_hidden = [True] + [False] * 6  # with a rank, q comes first
    assert launches(lambda: backend.edit_backward(h, None, None, *form, None, None, only_hidden, BF16))[0] == 1 + (rank > 0)
    norm = (h, h, out, h, None, weight, None, rstd, *form, None, z, False, RMS, [*wanted, True], [False, False], BF16, BF16)
    assert launches(lambda: backend.edit_add_norm_backward(*norm))[0] <= 4
