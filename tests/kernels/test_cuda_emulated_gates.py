"""The gate inside kernels/cuda's edits, on a machine without a GPU (tests/cuda_emulator).

Checked as test_cuda_emulated.py checks, against the reference in float64. Thresholds lie between two rows' scores, so
that a rounding decides no hard gate.
"""

import itertools

import emulated_cases as emulated
import pytest
import torch
from emulated_cases import BF16, F32, HALF, PAIRS, cuda, make_form, names, plain_schedule, pytestmark, stream
from test_cuda_streams import once

harness, reference = emulated.harness, emulated.reference
double, same_bits = emulated.double, emulated.same_bits
__all__ = ["cuda", "plain_schedule", "pytestmark"]

# Tiles of one and many threads; 16-bit vectors do not divide 100, none divides 1030; 8200 is beyond the tiles.
SIZES = [(33, 384), (7, 4096), (7, 100), (9, 1030), (3, 8200)]
GATES = [(sharpness, cosine) for sharpness in (0.0, 6.0) for cosine in (0.0, 1.0)]
GATE_IDS = ["hard dot", "hard cosine", "soft dot", "soft cosine"]


def scores(h, gate, cosine):
    """s of each row in float64."""
    h, gate = h.double(), gate.double()
    return (h * gate).sum(-1) / (h.norm(dim=-1) if cosine else 1)


def threshold_between(s):
    """Midway between two middle scores: half of the rows are open, and a row that is alone."""
    if len(s) < 2:
        return float(s.sum()) - 0.1
    s = s.sort().values
    return float(s[len(s) // 2 - 1] + s[len(s) // 2]) / 2


def gated(form, h, sharpness=0.0, cosine=0.0):
    """The form with a gate that opens for half of the rows h, of each slot's where there are slots."""
    slot, lead = form.get("slot"), () if form.get("slot") is None else (len(form["scale"]),)
    gate = torch.randn(*lead, h.shape[1]) / h.shape[1] ** 0.5
    if slot is None:
        rules = [[threshold_between(scores(h, gate, cosine)), sharpness, cosine]]
    else:
        rules = [[threshold_between(scores(h[slot == i], g, cosine)), sharpness, cosine] for i, g in enumerate(gate)]
    return {**form, "gate": gate, "rule": torch.tensor(rules).view(*lead, 3)}


def by_definition(op, streams, form, dtype, *options):
    """The reference's outputs in float64, or with fp32 arithmetic and the streams' own dtypes."""
    gate = {n: form[n].to(dtype) for n in harness.GATE}
    if dtype == torch.float64:
        streams = double(streams)
    return getattr(reference, op)(*streams, *emulated.reference_form(form, dtype), *options, **gate)


def magnitudes(op, streams, form, exact, *options):
    """What the last place of h' is one of: h' moves by k′ u with a soft gate's score, a sum that cancels, k′ its slope."""
    on_sum = any(options)
    x, given = streams[0].double(), sum(double(streams)) if on_sum else streams[0].double()
    slot = emulated.reference_form(form, torch.float64)[5]
    gate, rule = (
        form[n].double() if slot is None else form[n].double()[slot.long().clamp_min(0)] for n in harness.GATE
    )
    terms = (given * gate).abs().sum(-1) / torch.where(rule[..., 2] > 0, given.norm(dim=-1), 1)
    slope = rule[..., 1] / 4 * form.get("coefficient", torch.ones(1)).double()
    plain = {n: t for n, t in form.items() if n not in ("coefficient", *harness.GATE)}
    given_form = emulated.reference_form(plain, torch.float64)
    edited = getattr(reference, op)(*double(streams), *given_form, *options)[0]
    update = edited - (x if len(streams) == 1 else sum(double(streams)))
    return exact.abs() + (slope * terms)[:, None] * update.abs()


def check(cuda, op, streams, form, *options):
    """op's outputs, compared; options: on_sum of an add."""
    low_rank = "read" in form
    got = getattr(cuda, op)(*streams, form, *options, want_z=low_rank)
    eager, exact = (by_definition(op, streams, form, dtype, *options, low_rank) for dtype in (F32, torch.float64))
    emulated.assert_all("out z", got, exact, eager, [magnitudes(op, streams, form, exact[0], *options), None])
    assert len(cuda.launches()) == 1
    return got


@pytest.mark.parametrize("dtype", [F32, BF16, HALF], ids=names)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rank", [0, 4])
def test_edit(cuda, size, dtype, rank):
    for gate, view in itertools.product(GATES, ("plain", "unaligned")):
        cuda.shift = view == "unaligned"
        hidden, form = stream(*size, dtype, view), make_form(*size, rank)
        check(cuda, "edit", (hidden,), gated(form, hidden, *gate))


@pytest.mark.parametrize("gate", GATES, ids=GATE_IDS)
@pytest.mark.parametrize(("width", "dtype"), [(384, F32), (384, BF16), (385, HALF)], ids=str)
def test_slots_and_coefficients(cuda, gate, width, dtype):
    """k = coefficient · g, each row by its slot's gate."""
    hidden = stream(43, width, dtype)
    for rank, slots, coefficient in itertools.product((0, 4), (None, 1, 3), ("rows", "shared")):
        form = gated(make_form(43, width, rank, slots, coefficient), hidden, *gate)
        check(cuda, "edit", (hidden,), form)


@pytest.mark.parametrize("rank", [1, 6, 7, 64])
@pytest.mark.parametrize("width", [384, 8200, 33])
def test_ranks(cuda, rank, width):
    """The gate's sums in the read rows' last tree of shuffles, split between two, and alone in theirs."""
    hidden = stream(5, width, F32)
    for gate in GATES:
        check(cuda, "edit", (hidden,), gated(make_form(5, width, rank), hidden, *gate))


@pytest.mark.parametrize("pair", PAIRS, ids=names)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("on_sum", [False, True], ids=["on x", "on sum"])
def test_edit_add(cuda, size, pair, on_sum):
    x, residual = stream(*size, pair[0], "strided"), stream(*size, pair[1])
    given = x.double() + residual.double() if on_sum else x
    for rank, slots, gate in [(0, None, (0.0, 0.0)), (0, 2, (6.0, 1.0)), (4, None, (0.0, 1.0)), (4, 2, (6.0, 0.0))]:
        form = gated(make_form(*size, rank, slots, "rows"), given, *gate)
        check(cuda, "edit_add", (x, residual), form, on_sum)


@pytest.mark.parametrize("pair", PAIRS, ids=names)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", [0, 1, 2], ids=["rms", "gemma", "layer"])
def test_edit_add_norm(cuda, size, pair, kind):
    x, residual = stream(*size, pair[0]), stream(*size, pair[1])
    weight = (torch.rand(size[1]) + 0.5).to(pair[1])
    norm_bias = torch.randn(size[1]).to(pair[1]) if kind == 2 else None
    for rank, gate, on_sum in [(0, (0.0, 1.0), True), (4, (6.0, 0.0), False)]:
        given = x.double() + residual.double() if on_sum else x
        form = gated(make_form(*size, rank), given, *gate)
        got = cuda.edit_add_norm(x, residual, weight, norm_bias, form, on_sum, kind, 1e-6, rank > 0)
        added = cuda.edit_add(x, residual, form, on_sum, rank > 0)
        assert same_bits(got[0], added[0]) and same_bits(got[2], added[1])
        exact, eager = (
            reference.edit_add_norm.__globals__["norm"](*tensors, kind, 1e-6)
            for tensors in (double((got[0], weight, norm_bias)), (got[0], weight, norm_bias))
        )
        emulated.assert_all("normed rstd", (got[1], got[4]), exact[::2], eager[::2])
        emulated.assert_promise("mean", got[3], exact[1], eager[1], largest=got[0])
        alone = cuda.edit_add_norm(x, residual, weight, norm_bias, form, on_sum, kind, want_out=False)
        assert same_bits(alone[1], got[1])


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("width", [64, 65, 8200])
@pytest.mark.parametrize("dtype", [F32, BF16, HALF], ids=names)
def test_an_open_gate_is_none_and_a_closed_one_leaves_the_bits(cuda, width, rank, dtype):
    hidden, residual = stream(6, width, dtype), stream(6, width, dtype)
    form = make_form(6, width, rank)
    for cosine in (0.0, 1.0):
        opened = gated(form, hidden, 0.0, cosine)
        opened["rule"][0] = -torch.inf
        assert same_bits(cuda.edit(hidden, opened)[0], cuda.edit(hidden, form)[0])
        for on_sum in (False, True):
            ungated = cuda.edit_add(hidden, residual, form, on_sum)
            assert same_bits(cuda.edit_add(hidden, residual, opened, on_sum)[0], ungated[0])
        closed = opened | {"rule": torch.tensor([torch.inf, 0.0, cosine])}
        assert same_bits(cuda.edit(hidden, closed)[0], hidden)
        for on_sum in (False, True):
            assert torch.equal(cuda.edit_add(hidden, residual, closed, on_sum)[0], residual + hidden)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("width", [64, 65, 8200])
def test_rows_that_are_not_the_edits_keep_their_bits(cuda, rank, width):
    """NaN payloads, negative zeros and subnormals too: behind closed gates, and whatever a soft gate's score is."""
    for dtype, bits in ((F32, torch.int32), (BF16, torch.int16), (HALF, torch.int16)):
        info = torch.iinfo(bits)
        hidden = torch.randint(info.min, info.max, (12, width), dtype=bits)
        hidden = hidden.where(hidden != harness.Outputs.POISON[dtype], 0).view(dtype)
        form = make_form(12, width, rank, 2, "rows") | {"gate": torch.randn(2, width)}
        form["slot"] = torch.tensor([-1, 2, 1000] * 4, dtype=torch.int32)
        form["slot"][:4], form["coefficient"][:4] = 0, 0
        form["bias"][:] = torch.nan
        for cosine in (0.0, 1.0):
            form["rule"] = torch.tensor([[-torch.inf, 1.0, cosine]]).repeat(2, 1)
            assert same_bits(cuda.edit(hidden, form)[0], hidden)
            closed = form | {"rule": torch.tensor([[torch.inf, 0.0, cosine]]).repeat(2, 1)}
            closed["slot"], closed["coefficient"] = torch.ones(12, dtype=torch.int32), torch.full((1,), -2.0)
            assert same_bits(cuda.edit(hidden, closed)[0], hidden)


@pytest.mark.parametrize("width", [64, 65, 8200])
def test_nan_closes_a_hard_gate(cuda, width):
    hidden, form = stream(6, width, BF16), {"bias": torch.ones(width), "gate": torch.zeros(width)}
    hidden[1, 3], hidden[4, width - 1] = torch.nan, torch.nan
    hidden[2, 5] = torch.inf  # a score of NaN by zeros, and over its length
    touched = torch.tensor([True, False, False, True, False, True])
    for cosine in (0.0, 1.0):
        form["rule"] = torch.tensor([-1.0, 0.0, cosine])
        out = cuda.edit(hidden, form)[0]
        assert same_bits(out[~touched], hidden[~touched])
        assert torch.equal(out[touched], (hidden[touched].float() + 1).to(BF16))
    form["rule"] = torch.tensor([torch.nan, 0.0, 0.0])
    assert same_bits(cuda.edit(hidden, form)[0], hidden)


@pytest.mark.parametrize("width", [64, 65])
def test_lengths_beyond_fp32(cuda, width):
    """A row of zeros, one whose squares are subnormal, one whose squares overflow: at right angles, and finite."""
    hidden = torch.stack([torch.zeros(width), torch.full((width,), 3e-21), torch.full((width,), 1e20)])
    form = {"bias": torch.full((width,), 1e20), "gate": torch.ones(width) / width**0.5}
    for threshold, opened in ((0.5, [0, 1, 0]), (-0.1, [1, 1, 1])):
        form["rule"] = torch.tensor([threshold, 0.0, 1.0])
        out = cuda.edit(hidden, form)[0]
        assert (out != hidden).any(1).tolist() == [bool(o) for o in opened]
    form["rule"] = torch.tensor([0.0, 50.0, 1.0])
    assert cuda.edit(hidden, form)[0].isfinite().all()


# Traffic and order


@pytest.mark.parametrize("width", [64, 4096, 8192])
@pytest.mark.parametrize("rank", [0, 4])
def test_a_gate_moves_no_stream_again(cuda, width, rank):
    """Whether it opens or not: a gated edit moves what an ungated one does."""
    for dtype in (F32, BF16):
        x, residual, weight = stream(8, width, dtype), stream(8, width, dtype), torch.rand(width).to(dtype)
        form = gated(make_form(8, width, rank), x, 0.0, 1.0)
        cuda.edit(x, form)
        once(cuda.moved, "hidden", "out")
        for on_sum in (False, True):
            cuda.edit_add(x, residual, form, on_sum)
            once(cuda.moved, "x residual", "out")
            cuda.edit_add_norm(x, residual, weight, None, form, on_sum)
            once(cuda.moved, "x residual", "out normed")


def test_rows_too_wide_for_tiles_come_once_more(cuda):
    """From L2: once for the score, with z's where there is a rank, once for out."""
    x = stream(2, 8200, BF16)
    for rank in (0, 4, 6):
        cuda.edit(x, gated(make_form(2, 8200, rank), x))
        once(cuda.moved, "", "out", {"hidden": 2.0})


@pytest.mark.parametrize("width", [384, 385, 8200])
@pytest.mark.parametrize("rank", [0, 4])
def test_bits_depend_on_neither_grid_nor_order_nor_other_rows(cuda, width, rank):
    x, residual = stream(7, width, BF16), stream(7, width, BF16)
    form = gated(make_form(7, width, rank, 2), x.double() + residual.double(), 6.0, 1.0)
    runs = []
    for multiprocessors, seed in ((3, 0), (1, 5), (132, 9)):
        cuda.schedule(multiprocessors, seed)
        runs.append(cuda.edit_add(x, residual, form, True)[0])
    assert all(same_bits(runs[0], other) for other in runs[1:])
    for row in range(7):
        alone = form | {"slot": form["slot"][row : row + 1].clone()}
        got = cuda.edit_add(x[row : row + 1].clone(), residual[row : row + 1].clone(), alone, True)[0]
        assert same_bits(got, runs[0][row : row + 1])


def test_a_gate_off_16_bytes_takes_the_scalar_path(cuda):
    """An address that no vector load may have: the emulator fails a launch that tries."""
    hidden = stream(5, 64, F32)
    form = gated(make_form(5, 64), hidden)
    whole = torch.empty(65)
    whole[1:] = form["gate"]
    check(cuda, "edit", (hidden,), form | {"gate": whole[1:]})
    assert "Any" in cuda.launches()[0][0]


def test_without_a_gate_rank_0_is_the_stream_kernel(cuda):
    hidden = stream(5, 64, F32)
    form = gated(make_form(5, 64), hidden)
    cuda.edit(hidden, form)
    assert "tile_rows" in cuda.launches()[0][0]
    cuda.edit(hidden, {n: p for n, p in form.items() if n not in harness.GATE})
    assert "stream_rows" in cuda.launches()[0][0]
