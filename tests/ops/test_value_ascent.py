"""value_ascent on every backend that can run here against the autograd loop in float64, and the value net itself."""

import copy
import pickle

import ascent_support
import pytest
import torch
from ascent_support import autograd_loop, make, make_net
from fastedit.kernels import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastedit
from fastedit import dispatch, ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (rows, width, units): one of each, no vector's multiple, groups of four rows and a rest, more than 64 units; two layers.
SIZES = [(1, 1, 1), (1, 64, 96), (3, 45, 70), (9, 100, 130), (5, 45, (70, 33)), (1, 20, (9, 40))]


@pytest.fixture(params=["reference", "cpu", *(pytest.param(n, marks=pytest.mark.gpu) for n in ("cuda", "triton"))])
def backend(request, monkeypatch):
    monkeypatch.setenv("FASTEDIT_BACKEND", request.param)
    dispatch.select.cache_clear()
    yield request.param
    dispatch.select.cache_clear()


def ascend(case, backend):
    if backend in ("cuda", "triton"):
        net = copy.deepcopy(case.net).cuda()
        return ops.value_ascent(case.hidden.cuda(), net, case.steps, case.step_size).cpu()
    return ops.value_ascent(case.hidden, case.net, case.steps, case.step_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, width, units", SIZES, ids=str)
def test_keeps_the_promise(backend, rows, width, units, dtype):
    case = make(rows, width, units, steps=15, dtype=dtype)
    assert (case.exact - case.hidden.double()).abs().max() > 1e-3 or width == 1  # it moves
    ascent_support.assert_promise(case, ascend(case, backend))


def test_many_signs_change():
    """The flips are what the kernels do: as many as half of all units must have changed at least once."""
    case = make(6, 32, 64, steps=20, gain=60.0)
    z = [x @ case.net.weight.T + case.net.bias > 0 for x in (case.hidden, case.exact.float())]
    assert (z[0] != z[1]).float().mean() > 0.2
    ascent_support.assert_promise(case, ops.value_ascent(case.hidden, case.net, case.steps, case.step_size))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 5), st.integers(1, 40), st.one_of(st.integers(1, 90), st.tuples(st.integers(1, 50), st.integers(1, 50))),
    st.integers(0, 25), st.floats(0.01, 2.0), st.integers(0, 100),
)  # fmt: skip
def test_equals_the_autograd_loop_in_float64(rows, width, units, steps, step_size, seed):
    net = make_net(width, units, gain=5.0, seed=seed)
    hidden = torch.randn(rows, width, dtype=torch.float64)
    exact, margin = autograd_loop(hidden, net, steps, step_size)
    if margin < 1e-11:  # a tie even in float64
        return
    found = ops.value_ascent(hidden, net, steps, step_size)
    assert found.dtype == torch.float64 and found.shape == hidden.shape
    if rows:
        assert float((found - exact).abs().max()) <= 1e-12 * float(exact.abs().max())


def test_a_unit_at_zero_is_off():
    """relu'(0) = 0: as autograd has it, and as every step must."""
    net = fastedit.ValueNet(2, 2).requires_grad_(False)
    net.weight.copy_(torch.eye(2))
    net.bias.zero_()
    net.head.copy_(torch.tensor([1.0, 2.0]))
    hidden = torch.tensor([[0.0, 1.0], [-1.0, 0.0], [0.0, -0.0]])
    expected, _ = autograd_loop(hidden, net, 3, 0.25)
    assert torch.equal(ops.value_ascent(hidden, net, 3, 0.25), expected)
    assert torch.equal(expected, torch.tensor([[0.0, 2.5], [-1.0, 0.0], [0.0, 0.0]]))
    # A unit that arrives at 0 exactly goes off: z = 1, −1 a step by the other unit's pull.
    net.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    net.bias.copy_(torch.tensor([0.0, 3.0]))
    hidden = torch.tensor([[1.0, 5.0]])
    expected, _ = autograd_loop(hidden, net, 4, 1.0)
    assert torch.equal(ops.value_ascent(hidden, net, 4, 1.0), expected)


def test_rows_do_not_depend_on_each_other_or_on_the_threads():
    for units in (70, (70, 33)):
        case = make(11, 40, units, steps=8)
        arguments = (case.net, case.steps, case.step_size)
        together, threads = ops.value_ascent(case.hidden, *arguments), torch.get_num_threads()
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                assert torch.equal(ops.value_ascent(case.hidden, *arguments), together)
        finally:
            torch.set_num_threads(threads)
        for r in range(11):
            assert torch.equal(ops.value_ascent(case.hidden[r], *arguments), together[r])


def test_threads_of_a_large_net_agree():
    """Large enough for the products and the steps to be shared out, and more rows than one block of 32."""
    net, hidden, threads = make_net(300, 500, gain=9.0), torch.randn(37, 300), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(ops.value_ascent(hidden, net, 6, 0.5))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(r, results[0]) for r in results)
    assert torch.equal(ops.value_ascent(hidden[33:35], net, 6, 0.5), results[0][33:35])


def test_units_of_a_second_layer_that_are_not_looked_at_keep_their_signs():
    """Small steps: most units are far from changing, and a kernel may say so without a look; the rest must be seen."""
    case = make(6, 96, (160, 128), steps=40, step_size=0.05, gain=2.0)
    found = ops.value_ascent(case.hidden, case.net, case.steps, case.step_size)
    ascent_support.assert_promise(case, found)
    before, after = (torch.relu(h @ case.net.weight.T + case.net.bias) @ case.net.weight2.T + case.net.bias2 > 0
                     for h in (case.hidden, found))  # fmt: skip
    assert 0 < int((before != after).sum()) < before.numel() // 4
    alone = [ops.value_ascent(row[None], case.net, case.steps, case.step_size) for row in case.hidden]
    assert torch.equal(torch.cat(alone), found)


def test_views_and_shapes(backend):
    if backend in ("cuda", "triton"):
        pytest.skip("views are flattened before the backend")
    case = make(6, 45, 70, steps=9)
    expected = ops.value_ascent(case.hidden, case.net, 9, 0.5)
    wide = torch.full((6, 60), torch.nan)
    wide[:, 7:52] = case.hidden
    unaligned = torch.empty(6 * 45 + 1)[1:].view(6, 45).copy_(case.hidden)
    for view in (wide[:, 7:52], unaligned, case.hidden.T.contiguous().T):
        assert torch.equal(ops.value_ascent(view, case.net, 9, 0.5), expected)
    out = ops.value_ascent(case.hidden.view(2, 3, 45), case.net, 9, 0.5)
    assert out.shape == (2, 3, 45) and out.is_contiguous() and torch.equal(out.view(6, 45), expected)


def test_empty_inputs_and_no_steps(backend):
    if backend in ("cuda", "triton"):
        pytest.skip("answered before the backend")
    net, hidden = make_net(8, 5), torch.randn(2, 8)
    assert ops.value_ascent(hidden[:0], net, 3, 0.5).shape == (0, 8)
    assert ops.value_ascent(torch.empty(0, 4, 8), net, 3, 0.5).shape == (0, 4, 8)
    same = ops.value_ascent(hidden, net, 0, 0.5)
    assert torch.equal(same, hidden) and same.data_ptr() != hidden.data_ptr()
    one, _ = autograd_loop(hidden, net, 1, 0.5)
    torch.testing.assert_close(ops.value_ascent(hidden, net, 1, 0.5), one)


def test_has_no_gradient_and_leaves_its_input_alone():
    net, hidden = fastedit.ValueNet(8, 5), torch.randn(3, 8, requires_grad=True)
    before = hidden.detach().clone()
    assert not ops.value_ascent(hidden, net, 3, 0.5).requires_grad
    assert torch.equal(hidden.detach(), before) and net.weight.grad is None


def test_the_gram_matrix_is_kept_until_the_weight_changes():
    net, hidden = make_net(12, 20), torch.randn(3, 12)
    first = net.gram()
    assert net.gram() is first and net.gram(torch.float64) is not first
    torch.testing.assert_close(first.double(), net.weight.double() @ net.weight.double().T, rtol=1e-7, atol=1e-7)
    net.head.mul_(2)
    net.bias.add_(1)
    assert net.gram() is first
    for change in (lambda: net.weight.mul_(1.5), lambda: setattr(net, "weight", nn.Parameter(net.weight.detach() * 0.5))):
        before = net.gram()
        change()
        assert net.gram() is not before
        expected, _ = autograd_loop(hidden.double(), net, 6, 0.5)
        torch.testing.assert_close(ops.value_ascent(hidden, net, 6, 0.5).double(), expected, rtol=1e-5, atol=1e-6)
    other = copy.deepcopy(net)
    assert torch.equal(other.gram(), net.gram()) and torch.equal(pickle.loads(pickle.dumps(net)).gram(), net.gram())
    assert set(net.state_dict()) == {"weight", "bias", "head", "offset"}


def test_compiles_without_a_break_and_notices_a_stale_gram_matrix():
    torch._dynamo.reset()
    net, hidden = make_net(12, 20), torch.randn(5, 12)
    compiled = torch.compile(lambda h: ops.value_ascent(h, net, 4, 0.5), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"call value_net.gram\(\) before compiling"):
        compiled(hidden)
    torch._dynamo.reset()
    net.gram()
    assert torch.equal(compiled(hidden), ops.value_ascent(hidden, net, 4, 0.5))
    with torch.no_grad():
        net.weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="changed since its Gram matrix was made"):
        compiled(hidden)
    net.gram()
    assert torch.equal(compiled(hidden), ops.value_ascent(hidden, net, 4, 0.5))


@pytest.mark.parametrize("units", [20, (20, 7)])
def test_opcheck(units):
    net = make_net(12, units)
    arguments = (torch.randn(2, 3, 12), *net.tensors(), net.gram(), -1, 4, 0.5)
    torch.library.opcheck(torch.ops.fastedit.value_ascent.default, arguments)


def test_in_inference_mode():
    with torch.inference_mode():
        net = fastedit.ValueNet(8, 5)
        hidden = torch.randn(2, 8)
        assert ops.value_ascent(hidden, net, 3, 0.5).is_inference()


# The value net


def test_from_sequential():
    for layers in (
        [nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 1)],
        [nn.Linear(9, 5, bias=False), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 1)],
    ):
        module = nn.Sequential(*layers).eval()
        net, hidden = fastedit.ValueNet.from_sequential(module), torch.randn(4, 9)
        torch.testing.assert_close(net(hidden), module(hidden)[:, 0])
        assert net.width == 9 and "width=9" in repr(net)
        with torch.no_grad():
            layers[0].weight.zero_()  # a copy
        assert net.weight.any()
    half = nn.Sequential(nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 1)).half()
    assert all(p.dtype == torch.float32 for p in fastedit.ValueNet.from_sequential(half).parameters())


def test_stays_fp32_and_trains():
    net = fastedit.ValueNet(9, (6, 5)).bfloat16().half()
    assert all(p.dtype == torch.float32 for p in net.parameters())
    assert net(torch.randn(2, 3, 9).bfloat16()).dtype == torch.float32
    assert net(torch.randn(2, 3, 9, dtype=torch.float64)).shape == (2, 3)
    net(torch.randn(4, 9)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


NET, H = make_net(8, 5), torch.randn(2, 8)
LINEAR, RELU = nn.Linear(8, 4), nn.ReLU()


def from_layers(*layers):
    return fastedit.ValueNet.from_sequential(nn.Sequential(*layers))


BAD = [
    (lambda: ops.value_ascent(H.long(), NET, 3, 0.5), TypeError, "hidden has dtype torch.int64"),
    (lambda: ops.value_ascent(H, nn.Linear(8, 1), 3, 0.5), TypeError, "value_net is Linear, expected a fastedit.ValueNet"),
    (lambda: ops.value_ascent(H[:, :7], NET, 3, 0.5), ValueError, "hidden is 7 wide, and the value net reads 8"),
    (lambda: ops.value_ascent(H.to("meta"), NET, 3, 0.5), ValueError, "hidden is on meta and the value net on cpu"),
    (lambda: ops.value_ascent(H, NET, -1, 0.5), ValueError, "steps is -1"),
    (lambda: ops.value_ascent(H, NET, 2.0, 0.5), ValueError, "steps is 2.0"),
    (lambda: ops.value_ascent(H, NET, 3, float("nan")), ValueError, "step_size is nan"),
    (lambda: ops.value_ascent(H, NET, 3, "fast"), ValueError, "step_size is 'fast'"),
    (lambda: fastedit.ValueNet(8, (1, 2, 3, 4)), ValueError, "one to three hidden layers"),
    (lambda: fastedit.ValueNet(0), ValueError, "expected one to three hidden layers of 1 unit"),
    (lambda: from_layers(LINEAR, nn.GELU(), nn.Linear(4, 1)), ValueError, "Linear, GELU, Linear"),
    (lambda: from_layers(LINEAR, RELU, nn.Linear(4, 2)).tensors(), ValueError, "several outputs has no kernel"),
    (lambda: ops.value_ascent(H, from_layers(LINEAR, RELU, nn.Linear(4, 2)), 3, 0.5), ValueError, "has 2 outputs: give target="),
    (lambda: from_layers(), ValueError, "the layers are none"),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_reference_is_the_loop_written_out():
    """One step and two hidden layers by hand: 1[z > 0] ⊙ W₂ᵀ (1[z₂ > 0] ⊙ head)."""
    net, hidden = make_net(6, (5, 4)), torch.randn(3, 6, dtype=torch.float64)
    w, b, w2, b2, head = (t.double() for t in net.tensors())
    z = hidden @ w.T + b
    z2 = z.clamp_min(0) @ w2.T + b2
    by_hand = hidden + 0.3 * ((z > 0) * (((z2 > 0) * head) @ w2)) @ w
    found = reference.value_ascent(hidden, *net.tensors(), net.gram(torch.float64), 1, 0.3)
    torch.testing.assert_close(found, by_hand, rtol=1e-14, atol=1e-15)
