"""moments on every backend that can run here against two passes in float64, and the accumulator made of it."""

import multiprocessing
import os

import pytest
import torch
from fastedit.kernels import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from moments_support import assert_exact

import fastedit
from fastedit import dispatch, ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (rows, width, groups): one row, one column, no vector's multiple, more than a block of 256, more groups than rows.
SIZES = [(1, 64, 0), (7, 1, 2), (7, 100, 3), (300, 100, 0), (1000, 1030, 3), (20, 40, 50)]


@pytest.fixture(params=["reference", "cpu", *(pytest.param(n, marks=pytest.mark.gpu) for n in ("cuda", "triton"))])
def device(request, monkeypatch):
    monkeypatch.setenv("FASTEDIT_BACKEND", request.param)
    dispatch.select.cache_clear()
    yield "cuda" if request.param in ("cuda", "triton") else "cpu"
    dispatch.select.cache_clear()


def make(rows, width, groups, dtype=torch.float32, offset=1000.0, device="cpu"):
    """Rows whose mean is `offset` deviations, and their groups, some of them −1."""
    hidden = (torch.randn(rows, width) + offset).to(dtype).to(device)
    return hidden, torch.randint(-1, groups, (rows,), dtype=torch.int32).to(device) if groups else None


def exact(hidden, group, groups):
    return tuple(t.to(hidden.device) for t in reference.moments(hidden.cpu(), None if group is None else group.cpu(), groups))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, width, groups", SIZES)
def test_equals_two_passes_in_float64(device, rows, width, groups, dtype):
    for offset in (0.0, 1000.0):
        hidden, group = make(rows, width, groups, dtype, offset, device)
        found = ops.moments(hidden, group, groups=groups or None)
        assert_exact(found, exact(hidden, group, groups or 1))


def test_the_two_passes_are_torch_var():
    """The oracle itself, against PyTorch's own mean and variance of each group."""
    hidden, group = make(200, 9, 3, torch.float64)
    count, mean, m2 = reference.moments(hidden, group, 3)
    for g in range(3):
        rows = hidden[group == g]
        assert count[g] == len(rows)
        torch.testing.assert_close(mean[g], rows.mean(0), rtol=1e-14, atol=0)
        torch.testing.assert_close(m2[g] / (count[g] - 1), rows.var(0), rtol=1e-12, atol=0)


def test_a_row_a_thousand_times_the_others(device):
    """The first token of a sequence often is: no shift taken from it may cost the others' digits."""
    hidden = torch.randn(300, 70, device=device)
    hidden[0] *= 3000
    assert_exact(ops.moments(hidden), exact(hidden, None, 1))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_masked_and_grouped_rows_are_those_rows_alone(data):
    shape = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))
    width, groups = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 4))
    seed = data.draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, width, generator=generator) * 3 - 20
    group = torch.randint(-1, groups, shape, dtype=torch.int32, generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.6
    count, mean, m2 = ops.moments(hidden, group, mask, groups)
    for g in range(groups):
        alone = hidden[(group == g) & mask]
        assert count[g] == len(alone)
        for found, wanted in zip((mean[g], m2[g]), reference.moments(alone, None, 1)[1:], strict=True):
            torch.testing.assert_close(found, wanted[0], rtol=1e-9, atol=1e-9)
    assert torch.equal(ops.moments(hidden, mask=mask)[0], mask.sum()[None])


def test_views_unaligned_and_far_apart(device):
    wide = torch.randn(90, 77, device=device) + 50
    group = torch.arange(90, dtype=torch.int32, device=device) % 2
    for view in (wide[:, 3:40], wide.T[:64].T, wide[::2][:, 1:], wide.view(9, 10, 77)[:, :, 5:]):
        of_view = group.view(9, 10) if view.dim() == 3 else group[: len(view)]
        flat = view.reshape(-1, view.shape[-1])
        assert_exact(ops.moments(view, of_view, groups=2), exact(flat, of_view.reshape(-1), 2))


def test_rows_left_out_may_hold_anything(device):
    hidden = torch.randn(50, 33, device=device)
    group = torch.zeros(50, dtype=torch.int32, device=device)
    group[::3] = -1
    expected = ops.moments(hidden, group)
    hidden[::3] = torch.nan
    assert all(torch.equal(a, b) for a, b in zip(ops.moments(hidden, group), expected, strict=True))


def test_empty_inputs(device):
    for shape in ((0, 8), (3, 0), (0, 4, 8)):
        count, mean, m2 = ops.moments(torch.empty(shape, device=device))
        rows = 3 if shape == (3, 0) else 0
        assert count.tolist() == [rows] and mean.shape == m2.shape == (1, shape[-1]) and not mean.any() and not m2.any()
    nobody = torch.full((5,), -1, dtype=torch.int32, device=device)
    count, mean, m2 = ops.moments(torch.randn(5, 8, device=device), nobody, groups=2)
    assert not count.any() and not mean.any() and not m2.any()


def test_deterministic_whatever_the_thread_count():
    hidden, group = make(3000, 200, 3, torch.bfloat16)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results += [ops.moments(hidden, group), ops.moments(hidden, group)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def test_has_no_gradient():
    hidden = torch.randn(4, 8, requires_grad=True)
    assert not any(t.requires_grad for t in ops.moments(hidden))


def test_compiles_without_a_break():
    torch._dynamo.reset()
    hidden, group = make(40, 16, 3)
    compiled = torch.compile(lambda h, g, m: ops.moments(h, g, m, 3), fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (40, 20):
        mask = torch.rand(rows) < 0.5
        arguments = (hidden[:rows], group[:rows], mask)
        assert all(torch.equal(a, b) for a, b in zip(compiled(*arguments), ops.moments(*arguments, 3), strict=True))
    torch.library.opcheck(torch.ops.fastedit.moments.default, (hidden, group, 3))
    torch.library.opcheck(torch.ops.fastedit.moments.default, (hidden[None], None, 1))


H, GROUP = torch.randn(2, 3, 8), torch.zeros(2, 3, dtype=torch.int32)
BAD = [
    (lambda: ops.moments(H.long()), TypeError, "hidden has dtype torch.int64"),
    (lambda: ops.moments(torch.tensor(1.0)), ValueError, "single number"),
    (lambda: ops.moments(H, GROUP.long()), TypeError, r"group has dtype torch.int64, expected torch.int32; use group.int\(\)"),
    (lambda: ops.moments(H, GROUP[0]), ValueError, r"group has shape \(3,\), expected one number per row: \(2, 3\)"),
    (lambda: ops.moments(H, GROUP.to("meta")), ValueError, "group is on meta"),
    (lambda: ops.moments(H, mask=GROUP), TypeError, "mask has dtype torch.int32, expected torch.bool"),
    (lambda: ops.moments(H, GROUP + 2, groups=2), IndexError, "group has the number 2, expected −1 .* or 0 to 1"),
    (lambda: ops.moments(H, groups=0), ValueError, "groups is 0"),
    (lambda: fastedit.Moments(0), ValueError, "width is 0"),
    (lambda: fastedit.Moments(7).update(H), ValueError, r"hidden has shape \(2, 3, 8\), expected \(…, 7\)"),
    (lambda: fastedit.Moments(8).merge(fastedit.Moments(8, 2)), ValueError, r"cannot merge \(2, 8\)"),
    (lambda: fastedit.Moments(8).merge(3), ValueError, "cannot merge int"),
    (lambda: fastedit.Moments(8).load_state_dict({}), ValueError, "expected count, mean, m2"),
    (lambda: fastedit.Moments(8).load_state_dict(fastedit.Moments(9).state_dict()), ValueError, r"mean is .* \(1, 9\), expected"),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


# The accumulator


def accumulate(hidden, group, cuts, groups=3):
    moments = fastedit.Moments(hidden.shape[-1], groups)
    for rows, of_rows in zip(hidden.tensor_split(cuts), group.tensor_split(cuts), strict=True):
        moments.update(rows, of_rows)
    return moments


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 120), max_size=4), st.integers(0, 1000))
def test_however_the_rows_are_cut(cuts, seed):
    torch.manual_seed(seed)
    hidden, group = make(120, 5, 3, offset=1e3)
    found = accumulate(hidden, group, sorted(cuts))
    halves = accumulate(hidden[:50], group[:50], []).merge(accumulate(hidden[50:], group[50:], []))
    count, mean, m2 = reference.moments(hidden, group, 3)
    for moments in (found, halves):
        assert torch.equal(moments.count, count)
        has = count > 0
        torch.testing.assert_close(moments.mean()[has], mean[has], rtol=1e-12, atol=0)
        wanted = m2 / (count - 1)[:, None]
        torch.testing.assert_close(moments.variance()[count > 1], wanted[count > 1], rtol=1e-6, atol=0)
        assert moments.mean()[~has].isnan().all() and moments.variance()[count < 2].isnan().all()


def test_state_dict_carries_on():
    hidden, group = make(80, 6, 2)
    moments = fastedit.Moments(6, 2).update(hidden[:30], group[:30])
    state = moments.state_dict()
    moments.update(hidden[30:], group[30:])
    resumed = fastedit.Moments(6, 2)
    resumed.load_state_dict(state)
    resumed.update(hidden[30:], group[30:])
    assert torch.equal(resumed.mean(), moments.mean()) and torch.equal(resumed.variance(0), moments.variance(0))
    assert resumed.groups == 2 and resumed.width == 6 and "rows=" in repr(resumed)


def _reduce(rank, path, hidden, group, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    moments = fastedit.Moments(hidden.shape[-1], 3).update(hidden[rank::2], group[rank::2]).all_reduce()
    results.put((rank, {name: t.tolist() for name, t in moments.state_dict().items()}))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_all_reduce_merges_processes_the_same_in_each(tmp_path):
    hidden, group = make(60, 4, 3)
    context = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")
    results = context.Queue()
    workers = [context.Process(target=_reduce, args=(r, tmp_path / "store", hidden, group, results)) for r in range(2)]
    for worker in workers:
        worker.start()
    found = dict(results.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join(60)
    assert found[0] == found[1]
    exact_count, exact_mean, exact_m2 = reference.moments(hidden, group, 3)
    assert found[0]["count"] == exact_count.tolist()
    torch.testing.assert_close(torch.tensor(found[0]["mean"], dtype=torch.float64), exact_mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.tensor(found[0]["m2"], dtype=torch.float64), exact_m2, rtol=1e-6, atol=0)
