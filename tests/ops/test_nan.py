"""NaN in the hidden states goes through every edit: seen where it was, in its row alone, and never hidden."""

import pytest
import tiny_models as tiny
import torch
from mode_cases import KINDS
from oracle import make_form
from patch_cases import scrambled

import fastedit as fe
from fastedit import dispatch, ops

PAYLOAD = {torch.float32: (torch.int32, 0x7FC12345), torch.bfloat16: (torch.int16, 0x7FC5), torch.float16: (torch.int16, 0x7E15)}
DTYPES = list(PAYLOAD)
ROWS, WIDTH, BAD = 9, 100, ((2, 0), (2, 57), (5, 99))


@pytest.fixture(params=[
    "reference", "cpu", pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("triton", marks=pytest.mark.gpu),
])  # fmt: skip
def device(request, monkeypatch):
    monkeypatch.setenv("FASTEDIT_BACKEND", request.param)
    dispatch.select.cache_clear()
    yield "cuda" if request.param in ("cuda", "triton") else "cpu"
    dispatch.select.cache_clear()


def rows(dtype, device):
    """(hidden states, the same with NaNs of a payload of their own, where they are)"""
    clean = torch.randn(ROWS, WIDTH).to(dtype)
    dirty, where = clean.clone(), torch.zeros(ROWS, WIDTH, dtype=torch.bool)
    for row, column in BAD:
        where[row, column] = True
    dirty.view(PAYLOAD[dtype][0])[where] = PAYLOAD[dtype][1]
    return clean.to(device), dirty.to(device), where.to(device)


def form(rank, device, slots=None):
    return {n: None if p is None else p.to(device) for n, p in make_form(WIDTH, rank, slots).items()}


def check(clean, dirty, where, whole_rows):
    """NaN exactly where it is expected, and every other row as without it."""
    expected = where.any(-1, keepdim=True).expand_as(where) if whole_rows else where
    assert torch.equal(dirty.isnan(), expected)
    untouched = ~where.any(-1)
    assert torch.equal(dirty[untouched], clean[untouched])


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_op_lets_nan_through(device, dtype, rank):
    clean, dirty, where = rows(dtype, device)
    other, given = torch.randn(ROWS, WIDTH).to(device, dtype), form(rank, device)
    weight = torch.ones(WIDTH, dtype=dtype, device=device)
    many = rank > 0  # a projection reads the whole row
    exact = device == "cuda" or dispatch.select("cpu", dtype).__name__ == "cpu"
    reference_rounds = many and not exact  # library products may round a row by its neighbours
    for op in (
        lambda h: ops.edit(h, **given),
        lambda h: ops.edit_add(h, other, **given),
        lambda h: ops.edit_add(other, h, **given, on="sum"),
        lambda h: ops.edit_add_norm(h, other, weight, **given)[0],
    ):
        a, b = op(clean), op(dirty)
        check(b.where(b.isnan(), a) if reference_rounds else a, b, where, many)
    for kind, bias in (("rms", None), ("gemma", None), ("layer", weight)):
        normed = [ops.edit_add_norm(h, other, weight, **given, norm_bias=bias, kind=kind)[1] for h in (clean, dirty)]
        assert torch.equal(normed[1].isnan(), where.any(-1, keepdim=True).expand_as(where))
    if many:
        z = ops.project(dirty, given["read"], given["offset"])
        assert torch.equal(z.isnan().all(-1), where.any(-1)) and torch.equal(z.isnan().any(-1), where.any(-1))


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_left_alone_keep_the_bits_of_their_nan(device, dtype, rank):
    """Coefficient 0, and slot −1: the payload too, which arithmetic need not keep."""
    _, dirty, where = rows(dtype, device)
    integer = PAYLOAD[dtype][0]
    off = torch.ones(ROWS, device=device)
    off[2] = off[5] = 0
    slot = torch.tensor([0, 1, -1, 0, 1, -1, 0, -1, 1], dtype=torch.int32, device=device)
    for out, alone in (
        (ops.edit(dirty, **form(rank, device), strength=off), off == 0),
        (ops.edit(dirty, **form(rank, device, slots=2), slot=slot), slot < 0),
        (ops.edit(dirty, **form(rank, device), strength=0.0), torch.ones_like(slot, dtype=torch.bool)),
    ):
        assert torch.equal(out.view(integer)[alone], dirty.view(integer)[alone])
        assert torch.equal(out.isnan(), where)


@pytest.mark.parametrize("rank", [0, 3])
def test_gradients_of_other_rows_stay_clean(device, rank):
    _, dirty, where = rows(torch.float32, device)
    hidden, given = dirty.requires_grad_(), {n: p.requires_grad_() for n, p in form(rank, device).items() if p is not None}
    ops.edit(hidden, **given).square().sum().backward()
    bad = where.any(-1)
    assert hidden.grad[~bad].isfinite().all() and hidden.grad[bad].isnan().any(-1).all()
    assert given["scale"].grad.isnan().any(), "a bad step must be seen, so that a loss scaler can skip it"


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rounding_makes_a_number_of_a_scales_nan(device, dtype, bits):
    """A payload of ones would carry over into the sign, and come out as a zero."""
    scale, x = torch.ones(WIDTH, device=device), torch.randn(ROWS, WIDTH).to(device, dtype).requires_grad_()
    bad = torch.zeros(ROWS, WIDTH, dtype=torch.bool, device=device)
    for column in (0, 57, WIDTH - 1):  # the last is of no whole register
        scale.view(torch.int32)[column], bad[:, column] = bits, True
    for out in (ops.edit(x, scale), ops.edit_add_norm(x, x.detach(), torch.ones_like(x[0]), scale)[0]):
        assert torch.equal(out.isnan(), bad)
        (back,) = torch.autograd.grad(out, x, torch.ones_like(out))
        assert torch.equal(back.isnan(), bad)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_models_nan_reaches_the_logits(kind, fused):
    """One sequence of two is bad; no edit at no strength hides it, and the other sequence does not see it."""
    model = tiny.build("llama", num_hidden_layers=2)
    handle = scrambled(fe.patch(model, [KINDS[kind](site=site) for site in ("mlp", "attn", "block")], fused=fused))
    given = torch.randn(2, 5, tiny.WIDTH)
    dirty = given.clone()
    dirty[0] = float("nan")
    for strength in (1.0, 0.0):
        handle.strength = strength
        with torch.no_grad():
            out, clean = model(inputs_embeds=dirty).logits, model(inputs_embeds=given).logits
        assert out[0].isnan().all() and torch.equal(out[1], clean[1])
