"""The gate inside the edits, by definition: kernels/reference against its formula in float64."""

import pytest
import torch
from fastedit.kernels import reference
from fastedit.kernels.reference.form import gated_coefficient

ROWS, WIDTH = 7, 12


def _rows(seed=0):
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _rule(threshold=0.1, sharpness=0.0, cosine=0.0):
    return torch.tensor([threshold, sharpness, cosine], dtype=torch.float64)


@pytest.mark.parametrize("cosine", [0.0, 1.0])
@pytest.mark.parametrize("sharpness", [0.0, 3.0])
def test_formula(cosine, sharpness):
    h, gate = _rows(), _rows(1)[0]
    s = h @ gate / (h.norm(dim=-1) if cosine else 1)
    expected = torch.sigmoid(3.0 * (s - 0.1)) if sharpness else (s > 0.1).double()
    assert 0 < expected.round().sum() < ROWS
    got = gated_coefficient(h, gate, _rule(0.1, sharpness, cosine), None, None)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    k = torch.rand(ROWS, dtype=torch.float64)
    dialled = gated_coefficient(h, gate, _rule(0.1, sharpness, cosine), None, k)
    torch.testing.assert_close(dialled, k * expected, rtol=1e-12, atol=0)


def test_a_row_of_zeros_is_at_right_angles_to_everything():
    h = torch.zeros(2, WIDTH, dtype=torch.float64)
    for cosine in (0.0, 1.0):
        assert gated_coefficient(h, _rows(1)[0], _rule(-0.1, 0, cosine), None, None).tolist() == [1, 1]
        assert gated_coefficient(h, _rows(1)[0], _rule(0.1, 0, cosine), None, None).tolist() == [0, 0]


def test_nan_does_not_open_a_hard_gate():
    h = _rows()
    h[2, 3] = float("nan")
    edited, _ = reference.edit(
        h, None, torch.ones(WIDTH), None, None, None, None, None, gate=torch.zeros(WIDTH), rule=_rule(-1)
    )
    assert torch.equal(edited[2].isnan(), h[2].isnan()) and torch.equal(edited[2, :3], h[2, :3])
    assert torch.equal(edited[[0, 1]], h[[0, 1]] + 1)


def test_each_row_by_its_slots_gate():
    h, gates = _rows(), _rows(1)[:3]
    rules = torch.stack([_rule(0.1), _rule(0.05, cosine=1), _rule(-0.2, sharpness=2)])
    slot = torch.tensor([0, 1, 2, -1, 0, 1, 2], dtype=torch.int32)
    bias = _rows(2)[:3].float()
    edited, _ = reference.edit(h, None, bias, None, None, None, slot, None, gate=gates, rule=rules)
    for row, s in enumerate(slot.tolist()):
        if s < 0:
            assert torch.equal(edited[row], h[row])
            continue
        alone, _ = reference.edit(
            h[row, None], None, bias[s], None, None, None, None, None, gate=gates[s], rule=rules[s]
        )
        assert torch.equal(edited[row], alone[0])


@pytest.mark.parametrize("on_sum", [False, True])
def test_an_add_gates_what_the_edit_is_given(on_sum):
    x, residual, gate, bias = _rows(), _rows(3), _rows(1)[0], _rows(2)[0].float()
    form = (None, bias, None, None, None, None, None)
    out, _ = reference.edit_add(x, residual, *form, on_sum, False, gate, _rule())
    h = x + residual if on_sum else x
    edited = h + ((h @ gate) > 0.1).double()[:, None] * bias.double()
    torch.testing.assert_close(out, edited if on_sum else residual + edited, rtol=1e-12, atol=1e-12)
    weight = torch.rand(WIDTH, dtype=torch.float64)
    summed, normed, *_ = reference.edit_add_norm(x, residual, weight, None, *form, on_sum, gate=gate, rule=_rule())
    assert torch.equal(summed, out)
    torch.testing.assert_close(normed, weight * out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt())
