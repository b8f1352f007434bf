"""Dose: the strength that moves the next-token distribution by a stated KL."""

import pytest
import torch
from tiny_models import LAYERS, build

import fastedit as fe
from fastedit.directions import dose as calibration

PROMPTS = [[3, 4, 5], [9, 8, 7, 6], [30, 31, 32], [50] * 6, [12]]


def mean_kl(model, prompts):
    """KL(model as it was ‖ model as it is) of the next token, one prompt at a time, in float64; call twice."""
    with torch.no_grad():
        return [model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1) for ids in prompts]


def kl_of(model, edit, strength, prompts):
    base = mean_kl(model, prompts)
    with fe.patch(model, edit) as handle:
        handle.strength = strength
        steered = mean_kl(model, prompts)
    return sum((p.exp() * (p - q)).sum().item() for p, q in zip(base, steered, strict=True)) / len(prompts)


def push(layers=1, seed=0, **where):
    return fe.Steer(torch.randn(32, generator=torch.Generator().manual_seed(seed)), layers=layers, **where)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("target", [1e-3, 0.1])
def test_the_strength_found_gives_the_kl_asked_for(family, target):
    model = build(family)
    dose = fe.calibrate(model, push(), PROMPTS, target_kl=target)
    assert dose.kl == pytest.approx(target, rel=0.01) and dose.prompts == 5
    assert kl_of(model, push(), dose.strength, PROMPTS) == pytest.approx(target, rel=0.011)
    assert not hasattr(model, "fastedit") and "fastedit" not in model._modules


def test_of_several_edits_with_strengths_of_their_own():
    model = build("llama")
    edits = [push(strength=0.3), fe.Ablate(torch.eye(32)[:2], layers=2)]
    dose = fe.calibrate(model, edits, PROMPTS, target_kl=0.02)
    assert kl_of(model, edits, dose.strength, PROMPTS) == pytest.approx(0.02, rel=0.011)


def test_a_handle_is_left_at_the_strength_found_and_other_handles_count():
    model = build("llama")
    with fe.patch(model, push(seed=5, layers=0)):
        with fe.patch(model, push()) as handle:
            dose = fe.calibrate(model, handle, PROMPTS, target_kl=0.05)
            assert handle.strength == dose.strength
        assert kl_of(model, push(), dose.strength, PROMPTS) == pytest.approx(0.05, rel=0.011)


def test_nothing_is_patched_or_traced_again_between_strengths(monkeypatch):
    model, forwards = build("llama"), []
    handle = fe.patch(model, push())
    monkeypatch.setattr(calibration, "patch", None)
    model.model.embed_tokens.register_forward_hook(lambda *a: forwards.append(1))
    dose = fe.calibrate(model, handle, PROMPTS, target_kl=0.05, tolerance=1e-4)
    assert dose.forwards == len(forwards) and dose.forwards % 4 == 0  # a forward for each length, base included
    assert dose.kl == pytest.approx(0.05, rel=1e-4)


def test_ready_batches_padded_on_either_side():
    model = build("llama")
    expected = fe.calibrate(model, push(), [[3, 4, 5], [9, 8, 7, 6]], target_kl=0.1, tolerance=1e-4)
    right = {"input_ids": torch.tensor([[3, 4, 5, 0], [9, 8, 7, 6]]), "attention_mask": torch.tensor([[1, 1, 1, 0], [1] * 4])}
    left = {
        "input_ids": torch.tensor([[0, 3, 4, 5], [9, 8, 7, 6]]), "attention_mask": torch.tensor([[0, 1, 1, 1], [1] * 4]),
        "position_ids": torch.tensor([[0, 0, 1, 2], [0, 1, 2, 3]]),
    }  # fmt: skip
    for batch in (right, left):
        found = fe.calibrate(model, push(), [batch], target_kl=0.1, tolerance=1e-4)
        assert found.strength == pytest.approx(expected.strength, rel=1e-3)


def test_what_cannot_be_reached():
    model = build("llama")
    orthogonal = fe.Ablate(torch.eye(32)[:1], layers=1)
    with fe.patch(model, [orthogonal]) as handle:
        handle.strength = 0.7
        with pytest.raises(ValueError, match="is not reached: up to strength 1 it is at most"):
            fe.calibrate(model, handle, PROMPTS, target_kl=5.0, largest=1.0)
        assert handle.strength == 0.7
    with pytest.raises(ValueError, match="positions are among"):
        fe.calibrate(model, push(positions="generated"), PROMPTS, target_kl=0.1)
    assert "fastedit" not in model._modules


def test_a_kl_that_is_no_number_is_refused():
    model = build("llama")
    huge = fe.Steer(torch.full((32,), 1e37), layers=LAYERS - 1)
    with pytest.raises(ValueError, match=r"the mean KL is nan|jumps past|not reached"):
        fe.calibrate(model, huge, PROMPTS, target_kl=50.0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"target_kl": 0.0}, "target_kl is 0.0"),
        ({"target_kl": float("inf")}, "target_kl is inf"),
        ({"tolerance": -1}, "tolerance is -1"),
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": ["text"]}, "tokenizer is None"),
        ({"edit": "steer"}, "expected a Handle"),
    ],
)
def test_bad_arguments(changes, message):
    given = {"edit": push(), "prompts": PROMPTS, "target_kl": 0.1} | changes
    with pytest.raises((ValueError, TypeError), match=message):
        fe.calibrate(build("llama"), given.pop("edit"), given.pop("prompts"), **given)
    with pytest.raises(ValueError, match="another model"):
        fe.calibrate(build("llama"), fe.patch(build("llama"), push()), PROMPTS, target_kl=0.1)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_over_a_continuation_that_the_model_without_the_edit_samples(family):
    model = build(family)
    edit = push(positions="generated")  # which the token behind a prompt does not feel
    state = torch.get_rng_state()
    dose = fe.calibrate(model, edit, PROMPTS, target_kl=0.05, new_tokens=6, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert dose.kl == pytest.approx(0.05, rel=0.01) and dose.prompts == 5 and 5 < dose.tokens <= 30
    meter = None
    with fe.patch(model, edit) as handle:
        meter = calibration._Continued(handle, calibration._batches(model, PROMPTS, None, 16, None), new_tokens=6, seed=3)
        assert handle._root.rows.lengths is None
    total = count = 0
    for inputs, picked in meter.batches:
        for ids, mask, behind in zip(inputs["input_ids"], inputs["attention_mask"], picked, strict=True):
            ids = ids[mask.bool()]
            length, stop = int(behind.int().argmax()) + 1, int(behind.sum())
            assert ids[:length].tolist() in PROMPTS and len(ids) == length + stop
            assert 2 not in ids[length:-1].tolist() and (stop == 6 or ids[-1] == 2)  # up to the end, with it
            with torch.no_grad():
                base = model(input_ids=ids[None]).logits[0, length - 1 : -1].double().log_softmax(-1)
                with fe.patch(model, edit) as handle:
                    handle.strength = dose.strength
                    handle.prompt(length)
                    said = model(input_ids=ids[None]).logits[0, length - 1 : -1].double().log_softmax(-1)
            torch.testing.assert_close(base[0], said[0], rtol=0, atol=1e-5)
            total, count = total + (base.exp() * (base - said)).sum().item(), count + stop
    assert count == dose.tokens and total / count == pytest.approx(dose.kl, rel=1e-3)


def test_a_continuation_of_what_cannot_be_continued():
    model, padded = build("llama"), {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    with pytest.raises(ValueError, match="pad on the left"):
        fe.calibrate(model, push(), [padded], target_kl=0.1, new_tokens=2)
    with pytest.raises(ValueError, match="new_tokens is 0"):
        fe.calibrate(model, push(), PROMPTS, target_kl=0.1, new_tokens=0)
