"""RoleRef: variance-masked vectors of pairs, their edit, and the report on refusals."""

import pytest
import torch
from test_directions import last_tokens, sets
from tiny_models import build, exact, site_module
from word_tokenizer import tokenizer as word_tokenizer

import fastedit as fe
from fastedit.methods import roleref
from fastedit.methods.replies import replies, wilson
from fastedit.texts.chat import prompt_ids


@pytest.fixture(scope="module")
def model():
    return exact(build("llama"))


def masked(apart, keep):
    """The definition, feature by feature."""
    mean = [float(sum(d[f] for d in apart) / len(apart)) for f in range(apart.shape[1])]
    variance = [float(sum((d[f] - m) ** 2 for d in apart) / len(apart)) for f, m in enumerate(mean)]
    limit = sorted(variance)[round(keep * len(variance)) - 1]
    return torch.tensor([m if v <= limit else 0.0 for m, v in zip(mean, variance, strict=True)], dtype=torch.float64)


@pytest.mark.parametrize("keep", [0.3, 0.5, 1.0])
def test_vectors_are_the_mean_difference_where_it_varies_least(model, keep):
    answerable, conflicting = sets()
    found = roleref.vectors(model, None, answerable, conflicting, keep=keep)
    assert found.layers == (0, 1, 2)
    for layer in found:
        apart = last_tokens(model, layer, answerable) - last_tokens(model, layer, conflicting)
        expected = masked(apart, keep)
        assert (found[layer] - expected).abs().max() <= 1e-6 * expected.abs().max()
        kept = found.statistics[layer]["kept"]
        assert int((found[layer] != 0).sum()) == kept == round(keep * 32)
        assert found.statistics[layer]["share"] == pytest.approx(float(expected.norm() / apart.mean(0).norm()) ** 2)


def test_measured_at_the_input_they_are_of_one_block_before(model):
    answerable, conflicting = sets()
    outputs = roleref.vectors(model, None, answerable, conflicting)
    inputs = roleref.vectors(model, None, answerable, conflicting, measured="input")
    assert inputs.layers == outputs.layers
    assert torch.equal(inputs[1], outputs[0]) and torch.equal(inputs[2], outputs[1])
    entering = []
    hook = site_module(model, "llama", "block", 0).register_forward_pre_hook(
        lambda m, args, kwargs: entering.append((args[0] if args else kwargs["hidden_states"])[0, -1].double()),
        with_kwargs=True,
    )
    with torch.no_grad():
        for ids in [*answerable, *conflicting]:
            model(input_ids=torch.tensor([ids]))
    hook.remove()
    entering = torch.stack(entering)
    expected = masked(entering[: len(answerable)] - entering[len(answerable) :], 0.5)
    assert (inputs[0] - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_the_edit_adds_a_tenth_of_them_the_other_way_at_every_block(model):
    answerable, conflicting = sets()
    vectors = roleref.vectors(model, None, answerable, conflicting)
    ids = torch.tensor([answerable[0]])
    with torch.no_grad():
        before = model.model(ids, output_hidden_states=True).hidden_states[1]
        with fe.patch(model, roleref.edit(vectors)):
            after = model.model(ids, output_hidden_states=True).hidden_states[1]
    assert torch.allclose(after, before - 0.1 * vectors[0], rtol=0, atol=1e-7)  # fp32 masters


def test_what_cannot_be_paired_is_refused(model):
    answerable, conflicting = sets()
    for wrong in ((answerable, conflicting[:-1]), (answerable[:1], conflicting[:1])):
        with pytest.raises(ValueError, match="expected two pairs or more"):
            roleref.vectors(model, None, *wrong)
    with pytest.raises(TypeError, match="found one text"):
        roleref.vectors(model, None, "why", conflicting)
    for keep in (0, 1.5, True, "half"):
        with pytest.raises(ValueError, match="keep is"):
            roleref.vectors(model, None, answerable, conflicting, keep=keep)
    with pytest.raises(ValueError, match="expected 'output' or 'input'"):
        roleref.vectors(model, None, answerable, conflicting, measured="between")


# --- replies and the report -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories():
    said = word_tokenizer()
    return build("llama", vocab_size=len(said)), said


PROMPTS = ["the cat", "a dog", "so it is very good . i think the", [{"role": "user", "content": "is it good ?"}]]


def test_replies_in_a_batch_are_those_of_one_at_a_time(stories):
    model, tokenizer = stories
    model.train()
    found = replies(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=3)
    assert model.training
    model.eval()
    for prompt, reply in zip(PROMPTS, found, strict=True):
        ids = prompt_ids(tokenizer, prompt)
        made = model.generate(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(), max_new_tokens=12, do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        assert reply == tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True) != ""


def test_the_report_counts_what_the_judge_says_at_each_strength(stories):
    model, tokenizer = stories
    push = torch.zeros(model.config.hidden_size)
    push[3] = 60.0
    with fe.patch(model, fe.Steer(push, layers=2)) as handle:
        plain = {}
        for strength in (0.0, 1.0):
            handle.strength = strength
            plain[strength] = replies(model, tokenizer, PROMPTS, max_new_tokens=8)
        assert plain[0.0] != plain[1.0]
        handle.strength = 0.5
        asked = []

        def judge(prompt, reply):
            asked.append((prompt, reply))
            return reply in plain[0.0]

        found = roleref.report(model, tokenizer, handle, PROMPTS[:2], PROMPTS[2:], judge, max_new_tokens=8)
        assert handle.strength == 0.5
    assert list(found) == [0.0, 1.0]
    assert found[0.0]["conflicting"] == roleref.Rate(2, 2) and found[0.0]["answerable"].share == 1.0
    expected = sum(reply in plain[0.0] for reply in plain[1.0][:2])
    assert found[1.0]["conflicting"] == roleref.Rate(expected, 2) and expected < 2
    assert asked[:2] == list(zip(PROMPTS[:2], plain[0.0][:2], strict=True))
    assert asked[3][0] == "is it good ?"  # of messages a judge is shown the last one's content
    assert "100.0 % (34–100)" in str(found) and len(str(found).splitlines()) == 3


def test_a_report_needs_queries_a_handle_and_a_judge_that_decides(stories):
    model, tokenizer = stories
    with fe.patch(model, fe.Steer(torch.ones(model.config.hidden_size), layers=0)) as handle:
        with pytest.raises(ValueError, match="answerable is empty"):
            roleref.report(model, tokenizer, handle, PROMPTS, [], lambda prompt, reply: True)
        with pytest.raises(TypeError, match="expected True for a refusal"):
            roleref.report(model, tokenizer, handle, PROMPTS[:1], PROMPTS[:1], lambda prompt, reply: "no", max_new_tokens=2)
        assert handle.strength == 1.0
        with pytest.raises(TypeError, match="not a fastedit Handle on this model"):
            roleref.report(build("llama"), tokenizer, handle, PROMPTS, PROMPTS, lambda prompt, reply: True)


def test_wilsons_interval():
    low, high = wilson(1, 64)
    assert (low, high) == pytest.approx((0.0028, 0.0833), abs=5e-4)
    assert wilson(0, 10)[0] == 0.0 and wilson(10, 10)[1] == 1.0
