"""CAST against the formulas of the paper and the released code's comparator, written out with hooks."""

import copy

import pytest
import tiny_models as tiny
import torch
from gate_cases import ATOL, prompts, vector

import fastedit as fe
from fastedit.methods import cast as cast_module
from fastedit.methods.cast import cast, condition, fit


def slow(model, ids, mask, opened, layers, over="mean"):
    """Logits with 0.7 · v added at `layers` where opened(similarities); also those, one per sequence."""
    model, found = copy.deepcopy(model), {}

    def measure(module, args, output):
        found["s"] = []
        for hidden, real in zip(output, mask.bool(), strict=True):
            h = hidden[real].mean(0) if over == "mean" else hidden[real][-1]
            c = vector(5).double()
            found["s"].append(torch.cosine_similarity(h, torch.tanh(torch.outer(c, c) / (c @ c) @ h), dim=0))

    def steer(module, args, output):
        k = torch.tensor([float(opened(s)) for s in found["s"]], dtype=output.dtype)
        return output + 0.7 * k[:, None, None] * vector(6).double()

    model.model.layers[0].register_forward_hook(measure)
    for layer in layers:
        model.model.layers[layer].register_forward_hook(steer)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits, torch.stack(found["s"])


@pytest.mark.parametrize("over", ["mean", "last"])
@pytest.mark.parametrize("when", ["above", "below", "larger", "smaller"])
def test_the_condition_decides_for_the_behaviour(when, over):
    model = tiny.exact(tiny.build("llama"))
    ids, mask = prompts()
    _, s = slow(model, ids, mask, lambda s: False, [1, 2], over)
    threshold = float(s.sort().values[1:3].mean())
    opens = (lambda s: s > threshold) if when in ("above", "smaller") else (lambda s: s < threshold)
    expected, _ = slow(model, ids, mask, opens, [1, 2], over)
    for sign in (1, -3):  # blind to the sign and the length
        rule = condition(sign * vector(5), layer=0, threshold=threshold, when=when, over=over)
        with fe.patch(model, cast(vector(6), rule, layers=[1, 2], strength=0.7)), torch.no_grad():
            got = model(input_ids=ids, attention_mask=mask).logits
        real = mask.bool()
        torch.testing.assert_close(got[real], expected[real], rtol=1e-6, atol=ATOL)


def test_rules_over_several_conditions():
    model = tiny.exact(tiny.build("llama"))
    ids, mask = prompts()
    _, s = slow(model, ids, mask, lambda s: False, [1])
    low, high = (float(s.sort().values[[n, n + 1]].mean()) for n in (0, 2))
    rule = condition(vector(5), layer=0, threshold=low) & ~condition(vector(5), layer=0, threshold=high)
    with fe.patch(model, cast(vector(6), rule, layers=[1], strength=0.7)), torch.no_grad():
        got = model(input_ids=ids, attention_mask=mask).logits
    expected, _ = slow(model, ids, mask, lambda s: low < s <= high, [1])
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-6, atol=ATOL)


def test_wrong_words():
    with pytest.raises(ValueError, match="when is 'greater', expected one of 'above'"):
        condition(vector(5), layer=0, threshold=0.1, when="greater")
    with pytest.raises(ValueError, match="over is 'first'"):
        condition(vector(5), layer=0, threshold=0.1, over="first")
    with pytest.raises(ValueError, match="comes after"):
        fe.patch(tiny.build("llama"), cast(vector(6), condition(vector(5), layer=2, threshold=0.1), layers=[1]))


def asked(count=12, seed=0):
    """Prompts that hold tokens 40 to 49, and prompts that hold 10 to 19 in their place."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randint(20, 40, (count, 5), generator=generator)
    sides = [frames.clone() for _ in range(2)]
    for side, first in zip(sides, (40, 10), strict=True):
        side[:, 1:4] = torch.randint(first, first + 4, (count, 3), generator=generator)
    return [side.tolist() for side in sides]


@pytest.mark.parametrize("over", ["mean", "last"])
@pytest.mark.parametrize("kind", ["pca", "mean"])
def test_a_condition_is_found_by_f1_and_decides_as_it_was_fitted(over, kind):
    model = tiny.exact(tiny.build("llama"))
    positive, negative = asked()
    found = fit(model, None, positive, negative, over=over, vector=kind, held_out=0.25)
    assert "threshold=" in repr(found) and "tensor" not in repr(found)
    assert found.held_out == 6 and set(found.table) == {0, 1, 2} and found.fitted_f1 == max(found.table.values())
    assert found.vector.norm().item() == pytest.approx(1, abs=1e-6) and -1 <= found.threshold <= 1
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    counts = {}
    with fe.patch(model, cast(vector(6), found.gate(), layers=[2], strength=5.0)) as handle, torch.no_grad():
        for name, prompts_ in (("positive", positive), ("negative", negative)):
            opened = []
            for ids in prompts_:
                handle.strength = 0.0
                plain = model(input_ids=torch.tensor([ids])).logits
                handle.strength = 1.0
                opened.append(bool((model(input_ids=torch.tensor([ids])).logits - plain).abs().max() > 1e-3))
            for part, numbers in (("held", order[:3]), ("fitted", order[3:])):
                counts[part, name] = sum(opened[n] for n in numbers), len(numbers)
    for part, f1 in (("held", found.f1), ("fitted", found.fitted_f1)):
        (hits, of), (wrong, _) = counts[part, "positive"], counts[part, "negative"]
        assert f1 == pytest.approx(2 * hits / (2 * hits + wrong + of - hits) if hits else 0.0)
    assert found.fitted_f1 > 2 / 3  # that of a gate that is always open


def test_the_threshold_is_the_best_of_all():
    generator = torch.Generator().manual_seed(0)
    positive, negative = torch.rand(9, generator=generator).double(), torch.rand(7, generator=generator).double() - 0.3
    f1, gap, threshold, when = cast_module._threshold(positive, negative)
    tried = {}
    for t in torch.linspace(-0.4, 1.1, 3001).double():
        for side in ("above", "below"):
            opened = [(s > t) if side == "above" else (s <= t) for s in (positive, negative)]
            tried[t.item(), side] = cast_module._f1(*opened)
    inside = [v for (t, _), v in tried.items() if min(positive.min(), negative.min()) < t < max(positive.max(), negative.max())]
    assert f1 == max(inside) and gap > 0
    said = [(s > threshold) if when == "above" else (s <= threshold) for s in (positive, negative)]
    assert cast_module._f1(*said) == f1 and cast_module._f1(torch.zeros(3).bool(), torch.ones(2).bool()) == 0.0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"over": "first"}, "over is 'first'"), ({"vector": "svd"}, "vector is 'svd'"), ({"held_out": 1}, "held_out is 1"),
        ({"positive": [[3, 4]] * 3}, "found 3 positive"), ({"positive": [[3, 4]] * 5}, "as many of both"),
    ],
)  # fmt: skip
def test_conditions_that_cannot_be_fitted(changes, message):
    given = {"positive": [[3, 4]] * 4, "negative": [[5, 6]] * 4} | changes
    with pytest.raises(ValueError, match=message):
        fit(tiny.build("llama"), None, given.pop("positive"), given.pop("negative"), **given)
