"""The gate inside the Triton edits under Triton's interpreter: against a float64 reference, and what is exact.

Thresholds lie in the middle of a gap between the rows' scores, so no rounding moves a row across one.
Not collected by name: test_triton_interpreter.py runs it with TRITON_INTERPRET=1.
"""

import itertools

import pytest
import torch
from fastedit.kernels import reference
from fastedit.kernels import triton as backend
from fastedit.kernels.reference.edit_add_norm import norm
from fastedit.kernels.reference.form import gated_coefficient
from triton.runtime.interpreter import GridExecutor
from triton_support import (
    BF16,
    F16,
    F32,
    GEMMA,
    LAYER,
    RMS,
    check,
    double,
    eager_edit_add,
    exact_form,
    in_range,
    make_form,
    poisoned_memory,  # noqa: F401, for every test here
    view,
)  # fmt: skip

COSINE, SHARPNESS = (0.0, 1.0), (0.0, 3.0)
RULES = list(itertools.product(COSINE, SHARPNESS))
every_rule = pytest.mark.parametrize(
    "cosine, sharpness", RULES, ids=["hard-dot", "soft-dot", "hard-cosine", "soft-cosine"]
)

# One block of whole rows (ragged, and several rows a program), products of 16 x 64 tiles that 100 columns do not fill.
CASES = [
    # rows width rank dtype residual slots coefficient strided
    (9, 64, 0, F32, F32, 0, "none", False),
    (20, 100, 0, BF16, BF16, 0, "rows", True),
    (9, 384, 0, F16, F32, 0, "one", False),
    (24, 100, 0, BF16, F32, 3, "rows", True),
    (9, 100, 4, F16, F16, 0, "rows", False),
    (24, 64, 4, F32, F32, 3, "none", True),
    (20, 100, 17, BF16, BF16, 0, "rows", True),
]
KEYS = "rows, width, rank, dtype, residual_dtype, slots, coefficient, strided"
every_case = pytest.mark.parametrize(
    KEYS, CASES, ids=[f"{c[1]}-rank{c[2]}-{str(c[3])[6:]}+{str(c[4])[6:]}-slots{c[5]}-k_{c[6]}" for c in CASES]
)


# --- gates ----------------------------------------------------------------------------------------


def gateable_form(rows, width, rank, slots, coefficient):
    """make_form's, with rows enough in every slot for a threshold between them."""
    *rest, slot, k = make_form(rows, width, rank, slots, coefficient)
    if slots:  # −1 and out of range among them, where there are rows for it
        untouched = 2 * (rows > 2 * slots)
        slot = (torch.arange(rows) % (slots + untouched) - untouched // 2).to(torch.int32)
    return *rest, slot, k


def scores(h, gate, cosine):
    """s (rows,) of float64 rows."""
    s = (h * gate).sum(-1)
    return s / h.norm(dim=-1) if cosine else s


def rule_for(s, cosine, sharpness):
    """(3,): a threshold in the middle of the widest gap of the middle scores s; their deviation is sharpness' unit."""
    ordered, deviation = s.sort().values, s.std().item()
    first = (len(s) - 1) // 3
    gaps = ordered.diff()[first : len(s) - 1 - first]
    at = first + int(gaps.argmax())
    assert gaps.max() > 0.01 * deviation, "no gap for a threshold"
    return torch.tensor([ordered[at : at + 2].mean(), sharpness / deviation, cosine], dtype=F32)


def make_gate(h, slot, slots, cosine, sharpness):
    """(gate, rule) for what the form is given, h (rows, width); with slots each has a rule of its own."""
    gate = torch.randn(*((slots,) if slots else ()), h.shape[1]) / h.shape[1] ** 0.5
    if not slots:
        return gate, rule_for(scores(h.double(), gate.double(), cosine), cosine, sharpness)
    rules, first = [], RULES.index((cosine, sharpness))
    for s in range(slots):
        cosine, sharpness = RULES[(first + s) % len(RULES)]
        rules.append(rule_for(scores(h[slot == s].double(), gate[s].double(), cosine), cosine, sharpness))
    return gate, torch.stack(rules)


def given(x, residual, on_sum):
    """What the form is given, in fp32."""
    return residual.float() + x.float() if on_sum else x.float()


def eager_form(form, h, gate, rule):
    """The form with k for its coefficient, from fp32 rows."""
    *parameters, slot, k = in_range(form)
    return *parameters, slot, gated_coefficient(h, gate, rule, slot, k)


def openness(form, h, gate, rule):
    """k (rows,) in float64, 0 for slot −1."""
    *_, slot, k = exact_form(form)
    k = gated_coefficient(h.double(), *double(gate, rule), slot, k)
    return k if slot is None else torch.where(slot < 0, 0.0, k)


def named(gate, rule):
    return {"gate": gate, "rule": rule}


# --- against float64 ------------------------------------------------------------------------------


@every_rule
@every_case
def test_gated_edits(rows, width, rank, dtype, residual_dtype, slots, coefficient, strided, cosine, sharpness):
    x, residual = view(rows, width, dtype, strided), view(rows, width, residual_dtype, strided)
    form = gateable_form(rows, width, rank, slots, coefficient)
    gate, rule = make_gate(x, form[5], slots, cosine, sharpness)
    k = openness(form, x, gate, rule)
    out, z = backend.edit(x, *form, True, gate, rule)
    exact, exact_z = reference.edit(x.double(), *exact_form(form), True, *double(gate, rule))
    eager = eager_form(form, x.float(), gate, rule)
    check("out", out, exact, eager_edit(x, eager))
    assert torch.equal(out[k == 0], x[k == 0]) and (k != 0).any() and (sharpness or (k == 0).any())
    if coefficient == "none":  # a hard gate's open rows are the edit's own, not h + 1 · update
        assert torch.equal(out[k == 1], backend.edit(x, *form)[0][k == 1])
    check("z", z, exact_z, eager_edit_add(x, x, eager, False)[1])

    on_sum = bool(cosine) != bool(sharpness)  # every case on x and on the sum, hard and soft, dot and cosine
    h = given(x, residual, on_sum)
    gate, rule = make_gate(h, form[5], slots, cosine, sharpness)
    added, z = backend.edit_add(x, residual, *form, on_sum, True, gate, rule)
    exact, exact_z = reference.edit_add(*double(x, residual), *exact_form(form), on_sum, True, *double(gate, rule))
    eager, eager_z = eager_edit_add(x, residual, eager_form(form, h, gate, rule), on_sum)
    check("added", added, exact, eager)
    check("z", z, exact_z, eager_z)
    closed = openness(form, h, gate, rule) == 0
    assert torch.equal(added[closed], (residual + x)[closed])


def eager_edit(x, form):
    return eager_edit_add(x, torch.zeros_like(x), form, False)[0]


@pytest.mark.parametrize(
    "rows, width, rank, slots, kind, on_sum, cosine, sharpness",
    [
        (9, 100, 0, 0, RMS, True, 0.0, 3.0),
        (24, 64, 0, 3, GEMMA, False, 0.0, 0.0),
        (9, 384, 4, 0, LAYER, False, 1.0, 3.0),
        (9, 384, 4, 0, LAYER, True, 0.0, 0.0),
        (20, 100, 17, 0, GEMMA, True, 1.0, 0.0),
    ],
    ids=str,
)
def test_gated_edit_add_norm(rows, width, rank, slots, kind, on_sum, cosine, sharpness):
    """The rows are edit_add's; the norm that of the stored rows."""
    check_norm(rows, width, rank, slots, kind, on_sum, cosine, sharpness, BF16)


@pytest.mark.parametrize(
    "rank, slots, kind, on_sum, cosine, sharpness",
    [(1, 2, LAYER, True, 1.0, 0.0), (0, 0, None, False, 1.0, 3.0)],
    ids=["slots", "edit"],
)
def test_rows_too_wide_to_stay_on_chip(rank, slots, kind, on_sum, cosine, sharpness):
    if kind is not None:
        return check_norm(4, 16500, rank, slots, kind, on_sum, cosine, sharpness, BF16)
    x, form = view(4, 16500, F32, True), make_form(4, 16500, rank, slots, "none")
    gate, rule = make_gate(x, None, 0, cosine, sharpness)
    out, _ = backend.edit(x, *form, gate=gate, rule=rule)
    exact, _ = reference.edit(x.double(), *exact_form(form), gate=gate.double(), rule=rule.double())
    check("out", out, exact, eager_edit(x, eager_form(form, x, gate, rule)))


def check_norm(rows, width, rank, slots, kind, on_sum, cosine, sharpness, dtype):
    x, residual, weight = view(rows, width, dtype, True), view(rows, width, dtype, True), view(1, width, dtype, False)[0]
    form, norm_bias = gateable_form(rows, width, rank, slots, "rows"), weight if kind == LAYER else None
    h = given(x, residual, on_sum)
    gate, rule = make_gate(h, form[5], slots, cosine, sharpness)
    out, normed, z, _, rstd = backend.edit_add_norm(
        x, residual, weight, norm_bias, *form, on_sum, kind, 1e-5, True, **named(gate, rule)
    )
    exact, exact_z = reference.edit_add(*double(x, residual), *exact_form(form), on_sum, True, *double(gate, rule))
    eager, eager_z = eager_edit_add(x, residual, eager_form(form, h, gate, rule), on_sum)
    check("out", out, exact, eager)
    check("z", z, exact_z, eager_z)
    closed = openness(form, h, gate, rule) == 0
    assert torch.equal(out[closed], (residual + x)[closed]) and not closed.all()
    plain = norm(out, weight, norm_bias, kind, 1e-5)
    assert (normed != plain[0]).double().mean() < 0.01
    check("rstd", rstd, norm(*double(out, weight, norm_bias), kind, 1e-5)[2], plain[2])


# --- exact promises and edges ---------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 4, 17])
@pytest.mark.parametrize("by", ["gate", "slot", "coefficient"])
def test_untouched_rows_keep_their_bits(by, rank):
    """Also where parameters are infinite and rows are not numbers; a soft gate of such a row is none of the edit's."""
    rows, width = 9, 100
    h, residual = view(rows, width, BF16, True), view(rows, width, BF16, True)
    h[2, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    form = list(make_form(rows, width, rank, 2 if by == "slot" else 0, "none"))
    gate, rule = torch.randn(width) / 10, torch.tensor([-100.0, 1.0, 0.0])
    untouched = torch.arange(rows) % 2 == 0
    if by == "slot":
        form[5] = torch.where(untouched, -1, 1).to(torch.int32)
        gate, rule = torch.stack((gate, gate)), torch.stack((rule, rule))
        form[0][0, 5] = float("inf")
    elif by == "coefficient":
        form[6] = torch.where(untouched, 0.0, 0.7)
    else:
        gate, rule = torch.zeros(width), torch.tensor([3.0, 0.0, 0.0])
        gate[0] = 1
        h[:, 0] = torch.where(untouched, -5, 5)
        h[2, 0] = float("nan")
    out, _ = backend.edit(h, *form, gate=gate, rule=rule)
    assert torch.equal(out[untouched].view(torch.int16), h[untouched].view(torch.int16))
    assert (out[~untouched] != h[~untouched]).any(1).all()
    for on_sum in (False, True):
        given_gate = torch.zeros_like(gate) if by == "gate" else gate  # what a sum holds in column 0 is another story
        added = backend.edit_add(h, residual, *form, on_sum, gate=given_gate, rule=rule)[0]
        assert torch.equal(added[untouched].nan_to_num(9.0), (residual + h)[untouched].nan_to_num(9.0))


@pytest.mark.parametrize("cosine", COSINE)
@pytest.mark.parametrize(
    "threshold, opened", [(-0.5, [True, True]), (0.0, [False, True]), (1.0, [False, False]), (float("nan"), [False, False])]
)
def test_the_edges_of_a_rule(threshold, opened, cosine):
    """A row of zeros has s = 0; s = threshold is shut; a NaN, in a row or a threshold, shuts a hard gate."""
    h, gate, form = torch.zeros(3, 100), torch.zeros(100), (None, torch.ones(100), *[None] * 5)
    h[1:, 0], gate[0] = torch.tensor([1, float("nan")]), 1
    out, _ = backend.edit(h, *form, gate=gate, rule=torch.tensor([threshold, 0.0, cosine]))
    expected = torch.where(torch.tensor([*opened, False])[:, None], h + 1, h)
    assert torch.equal(out.nan_to_num(9.0), expected.nan_to_num(9.0))


@pytest.mark.parametrize("rank, slots", [(0, 0), (4, 3), (17, 0)])
def test_the_same_bits_every_run_and_whatever_the_other_rows(rank, slots):
    rows, width = 40, 100
    form, h = gateable_form(rows, width, rank, slots, "rows"), view(rows, width, BF16, False)
    gate, rule = make_gate(h, form[5], slots, 1.0, 3.0)

    def run(n):
        cut = [t if t is None else t[:n] for t in form[5:]]
        return backend.edit(h[:n], *form[:5], *cut, gate=gate, rule=rule)[0]

    assert torch.equal(run(rows), run(rows)) and torch.equal(run(rows)[:9], run(9))


@pytest.mark.parametrize("rank", [0, 4, 17])
def test_one_launch_as_without_a_gate(rank, monkeypatch):
    rows, width, launched = 20, 100, []
    real = GridExecutor.__call__
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *a, **k: launched.append(self.fn.__name__) or real(self, *a, **k))
    x, form = view(rows, width, BF16, False), make_form(rows, width, rank, 0, "none")
    gate = named(torch.randn(2, width, 2)[0, :, 0], torch.tensor([[0.0], [1.0], [1.0]])[:, 0])  # neither contiguous
    out, _ = backend.edit(x, *form, **gate)
    backend.edit_add(x, x, *form, **gate)
    backend.edit_add_norm(x, x, x[0], None, *form, **gate)
    assert len(launched) == 3
    assert torch.equal(out, backend.edit(x, *form, **{name: t.contiguous() for name, t in gate.items()})[0])
