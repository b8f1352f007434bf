"""CAST against the formulas of the paper and the released code's comparator, written out with hooks."""

import copy

import pytest
import tiny_models as tiny
import torch
from gate_cases import ATOL, prompts, vector

import fastedit as fe
from fastedit.methods.cast import cast, condition


def slow(model, ids, mask, opened, layers, over="mean"):
    """Logits with 0.7 · v added at `layers` where opened(similarities); also those, one a sequence."""
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
