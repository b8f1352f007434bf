"""The normal form in float64: fold is sequential application, merge is the edit after the linear map."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastedit.edits.form import Form, at_strength, fold, fold_all, merge

TOLERANCE = 1e-12


def random_form(generator, width, parts):
    """parts: which of scale, bias, offset are there, and the rank."""
    scale, bias, offset, rank = parts

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    low_rank = (random(rank, width) / width**0.5, random(rank) if offset else None, random(rank, width)) if rank else (None,) * 3
    return Form(1 + 0.3 * random(width) if scale else None, random(width) if bias else None, *low_rank)


parts = st.tuples(st.booleans(), st.booleans(), st.booleans(), st.integers(0, 4))
stacks = st.lists(parts, min_size=0, max_size=5)


def relative_error(got, expected):
    return float((got - expected).abs().max() / expected.abs().max())


@settings(max_examples=150, deadline=None)
@given(stacks, st.integers(1, 40), st.integers(0, 2**31 - 1))
def test_fold_is_sequential_application(stack, width, seed):
    generator = torch.Generator().manual_seed(seed)
    forms = [random_form(generator, width, p) for p in stack]
    h = torch.randn(6, width, dtype=torch.float64, generator=generator)
    expected = h
    for form in forms:
        expected = form(expected)
    folded = fold_all(forms)
    assert folded.rank == sum(form.rank for form in forms)
    assert relative_error(folded(h), expected) <= TOLERANCE


@settings(max_examples=100, deadline=None)
@given(stacks, st.booleans(), st.integers(1, 40), st.integers(0, 2**31 - 1))
def test_merge_is_the_edit_after_the_linear_map(stack, with_bias, width, seed):
    generator = torch.Generator().manual_seed(seed)
    form = fold_all([random_form(generator, width, p) for p in stack])
    x = torch.randn(6, 17, dtype=torch.float64, generator=generator)
    weight = torch.randn(width, 17, dtype=torch.float64, generator=generator)
    bias = torch.randn(width, dtype=torch.float64, generator=generator) if with_bias else None
    expected = form(torch.nn.functional.linear(x, weight, bias))
    got = torch.nn.functional.linear(x, *merge(form, weight, bias))
    assert relative_error(got, expected) <= TOLERANCE


@settings(max_examples=50, deadline=None)
@given(parts, st.floats(-2, 2), st.integers(0, 2**31 - 1))
def test_strength_interpolates_from_the_untouched_state(part, strength, seed):
    generator = torch.Generator().manual_seed(seed)
    form = random_form(generator, 20, part)
    h = torch.randn(6, 20, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(at_strength(form, strength)(h), h + strength * (form(h) - h), rtol=1e-12, atol=1e-11)


def test_a_folded_form_dialled_is_not_its_parts_dialled():
    generator = torch.Generator().manual_seed(0)
    one, two = (random_form(generator, 8, (True, True, False, 0)) for _ in range(2))
    h = torch.randn(3, 8, dtype=torch.float64, generator=generator)
    parts_dialled = fold(at_strength(one, 0.5), at_strength(two, 0.5))(h)
    assert relative_error(at_strength(fold(one, two), 0.5)(h), parts_dialled) > 1e-2


def test_the_table_of_methods():
    """Rows of the table in docs/design.md against the methods' own formulas."""
    h, v = torch.randn(5, 9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    unit = (v / v.norm())[None]
    ablated = Form(read=unit, write=-unit)(h)
    torch.testing.assert_close(ablated, h - (h @ unit.T) * unit)
    assert float((ablated @ unit.T).abs().max()) < 1e-12
    clamped = Form(read=unit, offset=torch.tensor([-2.0], dtype=torch.float64), write=-unit)(h)
    torch.testing.assert_close(clamped @ unit.T, torch.full((5, 1), 2.0, dtype=torch.float64))
    w, r = torch.randn(3, 9, dtype=torch.float64), torch.linalg.qr(torch.randn(9, 3, dtype=torch.float64))[0].T
    c = torch.randn(3, dtype=torch.float64)
    loreft = Form(read=w - r, offset=c, write=r)(h)
    torch.testing.assert_close(loreft, h + (h @ w.T + c - h @ r.T) @ r)


def test_gradients_flow_through_fold():
    scale = torch.ones(4, dtype=torch.float64, requires_grad=True)
    form = fold(Form(scale=scale, bias=scale * 2), Form(read=torch.ones(1, 4).double(), write=torch.ones(1, 4).double()))
    form(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
    assert scale.grad.abs().min() > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"scale": torch.ones(3), "bias": torch.ones(4)}, r"bias has shape \(4,\), expected \(3,\)"),
        ({"read": torch.ones(1, 3)}, "read is given without write"),
        ({"write": torch.ones(1, 3)}, "write is given without read"),
        ({"offset": torch.ones(1), "scale": torch.ones(3)}, "offset is given without read"),
        ({"read": torch.ones(1, 3), "write": torch.ones(2, 3)}, "write has shape"),
        ({"read": torch.ones(2, 3), "write": torch.ones(2, 3), "offset": torch.ones(3)}, "offset has shape"),
        ({"read": torch.ones(3), "write": torch.ones(3)}, "rank, width"),
    ],
)
def test_shapes_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        Form(**arguments)


def test_widths_must_agree():
    with pytest.raises(ValueError, match="widths 3 and 4"):
        fold(Form(scale=torch.ones(3)), Form(scale=torch.ones(4)))
    with pytest.raises(ValueError, match="3 wide, but the linear map has 5 outputs"):
        merge(Form(scale=torch.ones(3)), torch.ones(5, 2))
