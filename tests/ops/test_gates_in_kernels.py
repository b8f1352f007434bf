"""The gate inside the edits, on every backend that can run here: against float64, bit for bit where k is 0 or 1, and in
the operations it becomes where a gradient is needed or a compiler looks on.

Thresholds lie in the middle of a gap between the rows' scores: one sum's rounding moves no row across them.
"""

import itertools

import numpy as np
import pytest
import torch
from fastedit.kernels import reference
from fastedit.kernels.reference.form import gated_coefficient
from oracle import FORM, assert_promise, doubled, eager_edit, eager_norm, exact_norm, make_form

from fastedit import _native, arrays, dispatch, ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 100, 1030]  # 1: one column; 100: no vector divides it; 1030: vectors, then a tail of six
ROWS = 10  # two groups of four rows, then two alone
KINDS = list(itertools.product([0.0, 1.0], [0.0, 2.0]))  # (cosine, sharpness)


@pytest.fixture(params=[
    pytest.param(name, marks=[pytest.mark.gpu] if name in ("cuda", "triton") else []) for name in dispatch.BACKENDS
])  # fmt: skip
def device(request, monkeypatch):
    """The device to test on, with its backend forced."""
    monkeypatch.setenv("FASTEDIT_BACKEND", request.param)
    dispatch.select.cache_clear()
    yield "cuda" if request.param in ("cuda", "triton") else "cpu"
    dispatch.select.cache_clear()


def random(*shape, seed=0, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def scores(h, gate, cosine):
    """s in float64."""
    h, gate = h.double(), gate.double()
    s = (h * gate).sum(-1)
    return s / h.norm(dim=-1) if cosine else s


def rule_between(s, cosine=0.0, sharpness=0.0):
    """A rule whose threshold lies in the widest gap of the middle scores: a third of the rows and more on either side."""
    ordered = s.sort().values
    first = len(ordered) // 3
    gaps = ordered.diff()[first : max(2 * first, 1)]
    at = first + int(gaps.argmax())
    assert gaps.max() > 1e-3
    threshold = ordered[at : at + 2].mean()
    return torch.tensor([threshold, sharpness, cosine], dtype=torch.float32, device=s.device)


def gated_case(width, dtype, cosine, sharpness, device, rows=ROWS, rank=0, residual=None):
    """(x, residual, form, gate, rule); the rule is for the sum where `residual` is a dtype. Rows by falling score: a group
    of four whose gates are open, one of both kinds, shut ones.
    """
    x = random(rows, width, seed=1, dtype=dtype, device=device)
    other = None if residual is None else random(rows, width, seed=2, dtype=residual, device=device)
    gate = random(width, seed=3, device=device) / (width**0.5 if cosine else 1)
    form = {n: None if p is None else p.to(device) for n, p in make_form(width, rank).items()}
    s = scores(x.double() if other is None else x.double() + other.double(), gate, cosine)
    order = s.argsort(descending=True)
    return x[order], None if other is None else other[order], form, gate, rule_between(s, cosine, sharpness)


def eager_gate(h, gate, rule, strength=None):
    """k as a user writes it in fp32."""
    h = h.float()
    s = h @ gate
    s = s / h.norm(dim=-1) if rule[2] else s
    g = torch.sigmoid(rule[1] * (s - rule[0])) if rule[1] else (s > rule[0]).float()
    return g if strength is None else strength * g


def exactly(op, streams, form, *more, gate, rule, strength=None, slot=None):
    values = (doubled(form)[n] for n in FORM)
    out, _ = op(*(t.double() for t in streams), *values, slot, doubled(strength), *more, gate=gate.double(), rule=rule.double())
    return out


# --- against float64 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edit(device, dtype, rank):
    for width, (cosine, sharpness) in itertools.product(WIDTHS, KINDS):
        h, _, form, gate, rule = gated_case(width, dtype, cosine, sharpness, device, rank=rank)
        for strength in (None, torch.tensor([0.7], device=device), torch.rand(ROWS, device=device)):
            out = ops.edit(h, **form, strength=strength, gate=gate, rule=rule)
            exact = exactly(reference.edit, (h,), form, gate=gate, rule=rule, strength=strength)
            assert_promise("h'", out, exact, eager_edit(h, form, eager_gate(h, gate, rule, strength)).to(dtype))


@pytest.mark.parametrize("on", ["x", "sum"])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize(
    "dtype, residual_dtype", [*zip(DTYPES, DTYPES, strict=True), (torch.bfloat16, torch.float32)], ids=str
)
def test_edit_add(device, dtype, residual_dtype, rank, on, monkeypatch):
    if on == "sum" and dtype != residual_dtype:
        monkeypatch.delenv("FASTEDIT_BACKEND")  # served by the reference alone
        dispatch.select.cache_clear()
    for width, (cosine, sharpness) in itertools.product(WIDTHS, KINDS):
        x, residual, form, gate, rule = gated_case(
            width, dtype, cosine, sharpness, device, rank=rank, residual=residual_dtype
        )
        if on == "x":
            rule = rule_between(scores(x, gate, cosine), cosine, sharpness)
        out = ops.edit_add(x, residual, **form, on=on, gate=gate, rule=rule)
        exact = exactly(reference.edit_add, (x, residual), form, on == "sum", gate=gate, rule=rule)
        if on == "sum":
            total = residual + x
            eager = eager_edit(total, form, eager_gate(total, gate, rule))
        else:
            eager = residual + eager_edit(x, form, eager_gate(x, gate, rule))
        assert_promise("residual'", out, exact, eager.to(out.dtype))


@pytest.mark.parametrize("on", ["x", "sum"])
@pytest.mark.parametrize("kind", ["rms", "gemma", "layer"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edit_add_norm_stores_edit_adds_sum_and_norms_it(device, dtype, kind, on):
    for width, rank, (cosine, sharpness) in itertools.product([100, 1030], [0, 4], KINDS):
        x, residual, form, gate, rule = gated_case(width, dtype, cosine, sharpness, device, rank=rank, residual=dtype)
        weight = (1 + 0.2 * random(width, seed=5)).to(device, dtype)
        norm_bias = random(width, seed=6, dtype=dtype, device=device) if kind == "layer" else None
        gated = {"on": on, "gate": gate, "rule": rule}
        out, normed = ops.edit_add_norm(x, residual, weight, **form, norm_bias=norm_bias, kind=kind, eps=1e-5, **gated)
        assert torch.equal(out, ops.edit_add(x, residual, **form, **gated))
        exact = exact_norm(out, weight, norm_bias, kind, 1e-5)
        assert_promise("normed", normed, exact, eager_norm(out, weight, norm_bias, kind, 1e-5))
        alone = ops.edit_add_norm(
            x, residual, weight, **form, norm_bias=norm_bias, kind=kind, eps=1e-5, return_residual=False, **gated
        )
        assert torch.equal(alone[1], normed)


# --- bit for bit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_shut_gate_leaves_the_bits_and_an_open_one_gives_the_edits(device, dtype, rank):
    if dispatch.select(device, dtype).__name__ == "reference" and rank:
        pytest.skip("the reference's products depend on how many rows there are")
    for width, cosine in itertools.product([100, 1030], [0.0, 1.0]):
        x, residual, form, gate, rule = gated_case(width, dtype, cosine, 0.0, device, rank=rank, residual=dtype)
        for on in ("x", "sum"):
            s = scores(x.double() + (residual.double() if on == "sum" else 0), gate, cosine)
            rule = rule_between(s, cosine)
            opened = (s > rule[0])[:, None]
            assert 0 < int(opened.sum()) < ROWS
            gated = {"gate": gate, "rule": rule}
            if on == "x":
                got = ops.edit(x, **form, **gated)
                assert torch.equal(got, torch.where(opened, ops.edit(x, **form), x))
            got = ops.edit_add(x, residual, **form, on=on, **gated)
            assert torch.equal(got, torch.where(opened, ops.edit_add(x, residual, **form, on=on), ops.edit_add(x, residual)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_opens_no_hard_gate_and_strength_0_asks_none(device, dtype):
    h = random(ROWS, 100, dtype=dtype, device=device)
    h[3, 7], h[5] = float("nan"), float("inf")
    bias, gate = torch.ones(100, device=device), random(100, seed=3, device=device)
    integers = {4: torch.int32, 2: torch.int16}[h.element_size()]
    out = ops.edit(h, None, bias, gate=gate, rule=torch.tensor([-1e30, 0, 0], device=device))
    assert torch.equal(out.view(integers)[3], h.view(integers)[3])
    assert torch.equal(out[[0, 1]], ops.edit(h, None, bias)[[0, 1]])
    off = torch.ones(ROWS, device=device)
    off[[3, 5]] = 0
    for rule in ([0.0, 2, 0], [0.0, 2, 1], [0.0, 0, 1]):
        out = ops.edit(h, None, bias, strength=off, gate=gate, rule=torch.tensor(rule, device=device))
        assert torch.equal(out.view(integers)[[3, 5]], h.view(integers)[[3, 5]])


def test_rows_of_zeros_are_at_right_angles(device):
    h, bias, gate = (torch.zeros(5, 36, device=device), torch.ones(36, device=device), torch.ones(36, device=device))
    for cosine, threshold in itertools.product([0.0, 1.0], [-0.1, 0.1]):
        out = ops.edit(h, None, bias, gate=gate, rule=torch.tensor([threshold, 0, cosine], device=device))
        assert bool((out == (1.0 if threshold < 0 else 0.0)).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cosine, sharpness", KINDS)
def test_a_row_depends_on_neither_the_others_nor_the_threads(device, dtype, cosine, sharpness):
    if dispatch.select(device, dtype).__name__ == "reference":
        pytest.skip("the reference promises no bit-equality")
    rows, width = 70, 1030
    x, residual, form, gate, rule = gated_case(width, dtype, cosine, sharpness, device, rows, rank=4, residual=dtype)
    out = ops.edit_add(x, residual, **form, on="sum", gate=gate, rule=rule)
    for row in (0, 1, 2, 3, 68, 69):
        alone = ops.edit_add(x[row, None], residual[row, None], **form, on="sum", gate=gate, rule=rule)
        assert torch.equal(alone[0], out[row])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(out, ops.edit_add(x, residual, **form, on="sum", gate=gate, rule=rule))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(name):
    usual = _native.instruction_set()
    try:
        _native.set_instruction_set(name)
    except ValueError:
        pytest.skip(f"no {name} here")
    try:
        for dtype, width, kind in itertools.product(DTYPES, WIDTHS, KINDS):
            x, residual, form, gate, rule = gated_case(width, dtype, *kind, "cpu", rank=4, residual=dtype)
            out = ops.edit_add(x, residual, **form, on="sum", gate=gate, rule=rule)
            exact = exactly(reference.edit_add, (x, residual), form, True, gate=gate, rule=rule)
            total = residual + x
            assert_promise("residual'", out, exact, eager_edit(total, form, eager_gate(total, gate, rule)).to(dtype))
    finally:
        _native.set_instruction_set(usual)


# --- slots ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_row_by_its_slots_gate(device, dtype, rank):
    width, slots = 100, 3
    h = random(12, width, seed=1, dtype=dtype, device=device)
    slot = torch.tensor([0, 0, 0, 0, 1, 2, -1, 1, 2, 2, 0, -1], dtype=torch.int32, device=device)
    form = {n: None if p is None else p.to(device) for n, p in make_form(width, rank, slots).items()}
    gates = random(slots, width, seed=3, device=device)
    rules = torch.stack([
        rule_between(scores(h[slot == s], gates[s], cosine), cosine, sharpness)
        for s, (cosine, sharpness) in enumerate([(0.0, 0.0), (1.0, 0.0), (0.0, 2.0)])
    ])  # fmt: skip
    strength = torch.rand(12, device=device)
    out = ops.edit(h, **form, slot=slot, strength=strength, gate=gates, rule=rules)
    exact = exactly(reference.edit, (h,), form, gate=gates, rule=rules, strength=strength, slot=slot)
    own = slot.long().clamp_min(0)
    k = torch.stack([eager_gate(row, gates[s], rules[s], c) for row, s, c in zip(h, own, strength, strict=True)])
    k = torch.where(slot < 0, 0.0, k)
    eager = torch.stack([
        eager_edit(row[None], {n: None if p is None else p[s] for n, p in form.items()}, c.reshape(1))[0]
        for row, s, c in zip(h, own, k, strict=True)
    ])  # fmt: skip
    assert_promise("h'", out, exact, eager.to(dtype))
    assert torch.equal(out[slot < 0], h[slot < 0])
    added = ops.edit_add(h, h.flip(0), **form, on="sum", slot=slot, gate=gates, rule=rules)
    assert torch.equal(added[slot < 0], (h + h.flip(0))[slot < 0])


# --- where it becomes operations ------------------------------------------------------------------------------


@pytest.mark.parametrize("cosine", [0.0, 1.0])
@pytest.mark.parametrize("slotted", [False, True])
@pytest.mark.parametrize("op", ["edit", "x", "sum"])
def test_gradients_of_soft_gates(op, slotted, cosine):
    """In float64 against finite differences: of the rows, the form, the strength, the gate and its rule."""
    width, lead, slot = 6, (2,) if slotted else (), torch.tensor([0, 1, -1, 1], dtype=torch.int32) if slotted else None
    form = {n: p.double() for n, p in make_form(width, 2, *lead).items()}
    rule = torch.tensor([0.2, 1.5, cosine], dtype=torch.float64).expand(*lead, 3).clone()
    wanted = [random(4, width, seed=n).double() for n in (1, 2)] + [*form.values(), torch.rand(4).double()]
    wanted += [random(*lead, width, seed=4).double(), rule]
    wanted = [t.requires_grad_() for t in wanted]

    def call(x, residual, scale, bias, read, offset, write, strength, gate, rule):
        given = (scale, bias, read, offset, write)
        more = {"slot": slot, "strength": strength, "gate": gate, "rule": rule}
        return ops.edit(x, *given, **more) if op == "edit" else ops.edit_add(x, residual, *given, on=op, **more)

    if op == "edit":
        assert torch.autograd.gradcheck(lambda x, *rest: call(x, None, *rest), [wanted[0], *wanted[2:]])
    else:
        assert torch.autograd.gradcheck(call, wanted)


@pytest.mark.parametrize("cosine, sharpness", KINDS)
@pytest.mark.parametrize(
    ("dtype", "wide"), [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float64)], ids=str
)
def test_with_gradients_it_gives_what_it_gives_without(dtype, wide, cosine, sharpness):
    x, residual, form, gate, rule = gated_case(100, dtype, cosine, sharpness, "cpu", rank=4, residual=wide)
    weight = torch.ones(100, dtype=wide)
    gated = {"gate": gate, "rule": rule}
    for call in (
        lambda x: ops.edit_add(x, residual, **form, on="sum", **gated),
        lambda x: ops.edit_add_norm(x, residual, weight, **form, on="sum", **gated)[1],
    ):
        plain, leaf = call(x), x.clone().requires_grad_()
        with_graph = call(leaf)
        torch.testing.assert_close(with_graph.detach(), plain, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        with_graph.sum().backward()
        assert leaf.grad.isfinite().all() and bool(leaf.grad.any())
    if not sharpness:  # a hard gate is a constant: the gradient is that of the edit at this strength
        leaf, other = (x.clone().requires_grad_() for _ in range(2))
        ops.edit(leaf, **form, **gated, strength=0.5).sum().backward()
        k = gated_coefficient(x.double(), gate.double(), rule.double(), None, None).float()
        ops.edit(other, **form, strength=0.5 * k).sum().backward()
        assert torch.equal(leaf.grad, other.grad) or torch.allclose(leaf.grad, other.grad)


def test_compiled_is_eager():
    """In one graph for every kind of gate: the rule is data."""
    cases = [gated_case(36, torch.float32, *kind, "cpu", rank=4, residual=torch.float32) for kind in KINDS]
    weight, form = torch.ones(36), cases[0][2]

    def call(x, residual, gate, rule):
        gated = form | {"gate": gate, "rule": rule}
        first, added = ops.edit(x, **gated), ops.edit_add(x, residual, **gated, on="sum")
        return first, added, *ops.edit_add_norm(x, residual, weight, **gated, on="sum")

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for number, (x, residual, _, gate, rule) in enumerate(cases):
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            found = compiled(x, residual, gate, rule)
        for got, expected in zip(found, call(x, residual, gate, rule), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# --- what is refused, and the other faces ----------------------------------------------------------------------


H, GATE, RULE = torch.ones(3, 8), torch.ones(8), torch.zeros(3)
WRONG = [
    ({"gate": GATE}, ValueError, "gate is given without rule"),
    ({"rule": RULE}, ValueError, "rule is given without gate"),
    ({"gate": torch.ones(7), "rule": RULE}, ValueError, r"gate has shape \(7,\), expected \(8\)"),
    ({"gate": GATE, "rule": torch.zeros(2)}, ValueError, r"rule has shape \(2,\), expected \(3,\): threshold"),
    ({"gate": GATE.bfloat16(), "rule": RULE}, TypeError, "gate has dtype torch.bfloat16, expected float32"),
    ({"gate": GATE, "rule": RULE.double()}, TypeError, "rule has dtype torch.float64"),
    ({"gate": GATE.to("meta"), "rule": RULE}, ValueError, "gate is on meta"),
    ({"gate": GATE, "rule": RULE.to("meta")}, ValueError, "rule is on meta"),
    ({"gate": GATE, "rule": RULE, "slot": torch.zeros(3, dtype=torch.int32), "bias": torch.ones(2, 8)}, ValueError,
     r"gate has shape \(8,\), expected \(2, 8\)"),
]  # fmt: skip


@pytest.mark.parametrize("given, error, message", WRONG)
def test_wrong_gates(given, error, message):
    for op, streams in ((ops.edit, (H,)), (ops.edit_add, (H, H)), (ops.edit_add_norm, (H, H, torch.ones(8)))):
        with pytest.raises(error, match=message):
            op(*streams, **given)


def test_arrays_give_the_same_bits():
    for dtype, cosine, sharpness in itertools.product([torch.float32, torch.float16], [0.0, 1.0], [0.0, 2.0]):
        x, residual, form, gate, rule = gated_case(100, dtype, cosine, sharpness, "cpu", rank=4, residual=dtype)
        weight = torch.ones(100, dtype=dtype)
        own = {n: p.numpy() for n, p in form.items()} | {"gate": gate.numpy(), "rule": rule.numpy()}
        ours = form | {"gate": gate, "rule": rule}
        streams = (x.numpy(), residual.numpy())
        pairs = [(arrays.edit(streams[0], **own), ops.edit(x, **ours))]
        pairs.append((arrays.edit_add(*streams, **own, on="sum"), ops.edit_add(x, residual, **ours, on="sum")))
        pairs += zip(
            arrays.edit_add_norm(*streams, weight.numpy(), **own), ops.edit_add_norm(x, residual, weight, **ours), strict=True
        )
        for got, expected in pairs:
            assert np.array_equal(got, expected.numpy())
    with pytest.raises(ValueError, match="gate and rule belong together"):
        arrays.edit(H.numpy(), gate=GATE.numpy())
    with pytest.raises(ValueError, match="rule is float32"):
        arrays.edit(H.numpy(), gate=GATE.numpy(), rule=np.zeros(4, np.float32))
