"""Sweeps: every cell is what the edit by hand gives; intervals, controls, units, resuming, refusals."""

import json
import math

import pytest
import torch
from tiny_models import build

import fastedit as fe
from fastedit.directions import sweep as sweeping

PROMPTS = [[3, 4, 5], [9, 8, 7, 6], [30, 31, 32], [50] * 6]


def directions():
    generator = torch.Generator().manual_seed(0)
    vectors = {layer: torch.randn(32, generator=generator) for layer in range(3)}
    return fe.Directions(vectors, {layer: {"residual": 10.0 + layer} for layer in vectors})


def measure(model):
    """The log-probability of token 7 behind each prompt."""
    with torch.no_grad():
        return [model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)[7] for ids in PROMPTS]


def test_cells_are_what_the_edit_by_hand_gives():
    model, found = build("llama"), directions()
    swept = fe.sweep(model, found, measure, layers=[1, range(0, 2)], doses=[-2, 0.5], control=True, seed=3)
    assert [(cell.layers, cell.dose) for cell in swept.cells] == [((1,), -2), ((1,), 0.5), ((0, 1), -2), ((0, 1), 0.5)]
    for cell in swept.cells:
        for edit in (fe.Steer(found.at(*cell.layers), strength=cell.dose), swept.edit(cell)):
            with fe.patch(model, edit):
                values = torch.stack(measure(model))
            assert cell.mean == pytest.approx(values.mean().item(), rel=1e-5) and cell.count == 4
            assert cell.high - cell.mean == pytest.approx(1.96 * values.std().item() / 2, rel=1e-4)
        drawn = sweeping.random_like(found.at(*cell.layers), 3)
        with fe.patch(model, fe.Steer(drawn, strength=cell.dose)):
            assert cell.control["mean"] == pytest.approx(torch.stack(measure(model)).mean().item(), rel=1e-5)
    assert swept.base.mean == pytest.approx(torch.stack(measure(model)).mean().item()) and swept.base.layers == ()
    assert swept.best().mean == max(c.mean for c in swept.cells) and swept.best(False).mean == min(c.mean for c in swept.cells)
    assert "0–1" in str(swept) and len(str(swept).splitlines()) == 6


def test_doses_of_the_residuals_norm_and_of_kl(tmp_path):
    model, found = build("llama"), directions()
    by_norm = fe.sweep(model, found, measure, layers=[1], doses=[0.2], unit="residual")
    with fe.patch(model, by_norm.edit(by_norm.cells[0])) as handle:
        (bias,) = [tensor for name, tensor in handle.named_tensors().items() if name.endswith("bias")]
        assert bias.norm().item() == pytest.approx(0.2 * 11.0, rel=1e-5)
        assert by_norm.cells[0].mean == pytest.approx(torch.stack(measure(model)).mean().item(), rel=1e-5)
    by_kl = fe.sweep(model, found, measure, layers=[1], doses=[0.05], unit="kl", prompts=PROMPTS)
    dose = fe.calibrate(model, fe.Steer(found, layers=1), PROMPTS, target_kl=0.05)
    assert by_kl.cells[0].strength == pytest.approx(dose.strength, rel=1e-6)
    by_kl.heat_map(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"


def test_zeros_and_ones_are_a_share_with_wilsons_interval():
    mean, low, high, count = sweeping._summary([1, 1, 1, 1])
    assert (mean, high, count) == (1.0, 1.0, 4) and low == pytest.approx(1 / (1 + 1.96**2 / 4))
    assert sweeping._summary([0.5])[1] == -math.inf


def test_a_sweep_goes_on_where_it_was_interrupted(tmp_path):
    model, found, calls = build("llama"), directions(), []

    def dying(model):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(model)

    how = {"layers": [0, 1], "doses": [1, 2], "resume": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        fe.sweep(model, found, dying, **how)
    assert not any(module._forward_hooks for module in model.modules()) and "fastedit" not in model._modules
    again = fe.sweep(model, found, dying, **how)
    assert len(calls) == 3 + 3 and again.cells == fe.sweep(model, found, measure, layers=[0, 1], doses=[1, 2]).cells
    with pytest.raises(ValueError, match=r"another sweep \(site 'block'\)"):
        fe.sweep(model, found, measure, site="mlp", **how)
    (tmp_path / "sweep.json").write_text(json.dumps({"key": 1}))
    with pytest.raises(ValueError, match=r"not what fastedit\.sweep writes"):
        fe.sweep(model, found, measure, **how)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"doses": []}, "doses is"), ({"doses": [math.nan]}, "doses is"), ({"unit": "logits"}, "unit is 'logits'"),
        ({"layers": [7]}, r"layers \[7\] have no direction"), ({"layers": [()]}, "an empty set"),
        ({"unit": "kl"}, "needs prompts="), ({"prompts": PROMPTS}, "of unit='kl' alone"),
        ({"directions": {1: torch.ones(32)}}, "expected fastedit.Directions"),
        ({"measure": lambda model: []}, "measure gave 0 numbers"), ({"measure": lambda model: [math.nan]}, "all finite"),
    ],
)  # fmt: skip
def test_what_cannot_be_swept(changes, message):
    given = {"directions": directions(), "measure": measure, "doses": [1.0]} | changes
    with pytest.raises((ValueError, TypeError), match=message):
        fe.sweep(build("llama"), given.pop("directions"), given.pop("measure"), **given)
