"""InferAligner: the aligned model's vectors, on prompts that the target's own directions pick out."""

import pytest
import torch
from test_directions import last_tokens, sets
from tiny_models import build, exact

import fastedit as fe
from fastedit.methods import inferaligner


@pytest.fixture(scope="module")
def models():
    target, aligned = exact(build("llama")), exact(build("llama"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in aligned.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return target, aligned


def test_theta_is_the_aligned_models_and_the_gate_the_targets_own(models):
    target, aligned = models
    harmful, harmless = sets()
    found = inferaligner.fit(target, aligned, None, harmful, harmless)
    for layer in range(3):
        high, low = (last_tokens(aligned, layer, texts).mean(0) for texts in (harmful, harmless))
        assert (found.theta[layer] - (high - low)).abs().max() <= 1e-6 * (high - low).abs().max()
        assert found.own.statistics[layer]["accuracy"] >= 0.5
    alone = fe.contrast(target, None, harmful, harmless, method="probe", probe="mass-mean")
    assert found.own == alone
    again = inferaligner.fit(target, fe.contrast(aligned, None, harmful, harmless), None, harmful, harmless)
    assert again.theta == found.theta and again.own == found.own


@torch.no_grad()
def by_hand(target, guidance, layers, alpha, ids):
    """(hidden states, the gates) of one prompt, float64, with hooks."""
    opened, hooks = [], []
    for layer in layers:

        def steer(module, args, output, layer=layer):
            hidden = output[0] if isinstance(output, tuple) else output
            score = hidden[0, -1] @ guidance.own[layer].double() + guidance.own.statistics[layer]["offset"]
            opened.append(bool(score > 0))
            hidden = hidden + alpha * opened[-1] * guidance.theta[layer].double()
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        hooks.append(target.model.layers[layer].register_forward_hook(steer))
    hidden = target.model(torch.tensor([ids])).last_hidden_state[0]
    for hook in hooks:
        hook.remove()
    return hidden, opened


def test_only_prompts_that_the_gate_picks_are_guided_each_layer_by_itself(models):
    target, aligned = models
    harmful, harmless = sets()
    guidance = inferaligner.fit(target, aligned, None, harmful, harmless)
    layers, seen = [1, 2], set()
    prompts = [*harmful[:6], *harmless[:6]]
    with torch.no_grad(), fe.patch(target, guidance.edit(layers=layers, strength=1.5)):
        batch = target.model(torch.tensor(prompts)).last_hidden_state
    for ids, got in zip(prompts, batch, strict=True):
        expected, opened = by_hand(target, guidance, layers, 1.5, ids)
        seen.add(tuple(opened))
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert len(seen) > 1 and any(map(any, seen)) and not all(map(all, seen))


def test_what_a_prompt_decided_holds_for_what_is_generated(models):
    target, aligned = models
    harmful, harmless = sets()
    guidance = inferaligner.fit(target, aligned, None, harmful, harmless)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = torch.tensor([*harmful[:4], *harmless[:4]])
    with fe.patch(target, guidance.edit(layers=[1], strength=40.0)):
        made = target.generate(ids, **options)
    untouched = target.generate(ids, **options)
    opened = [by_hand(target, guidance, [1], 40.0, row.tolist())[1][0] for row in ids]
    always = fe.Steer({1: guidance.theta[1]}, layers=[1], strength=40.0)
    with fe.patch(target, always):
        steered = target.generate(ids, **options)
    expected = torch.stack([steered[k] if on else untouched[k] for k, on in enumerate(opened)])
    assert torch.equal(made, expected) and not torch.equal(steered, untouched) and len(set(opened)) == 2


def test_models_of_other_shapes_are_refused(models):
    target, _ = models
    harmful, harmless = sets()
    with pytest.raises(ValueError, match="same width and depth"):
        inferaligner.fit(target, exact(build("llama", num_hidden_layers=2)), None, harmful, harmless)
