"""RAHF against its formulas, written out with whole models and all hidden states."""

import copy

import pytest
import tiny_models as tiny
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

import fastedit as fe
from fastedit.capturing.truncated_forward import residual_stream
from fastedit.methods import rahf

LAYERS = (1, 2)


class Letters:
    """A tokenizer of characters."""

    pad_token_id = 0

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": ([1] if add_special_tokens else []) + [3 + ord(c) % 50 for c in text]}


ROWS = [{"prompt": "who is it", "response": "nobody"}, {"prompt": "why", "response": "because it is late"}]


def batch(instructions=("", "good:", "bad, bad:"), response=8):
    return rahf.Collator(Letters(), instructions, response)(ROWS)


def written_out(student, base, good, bad, given, alpha, squared):
    """The mean, a token at a time."""
    columns, mask, terms = given["response_mask"].shape[1], given["response_mask"], []

    def states(model, stimulus):
        with torch.set_grad_enabled(model is student):
            out = model(
                input_ids=given["input_ids"][stimulus], attention_mask=given["attention_mask"][stimulus],
                output_hidden_states=True, use_cache=False,
            )  # fmt: skip
        return [out.hidden_states[layer][:, -columns:] for layer in LAYERS]

    last = len(given["input_ids"]) - 1
    patterns = [states(student, 0), states(base, 0), states(good, min(1, last)), states(bad, min(2, last))]
    for s, t, g, b in zip(*patterns, strict=True):
        for row in range(len(mask)):
            for token in range(columns):
                if mask[row, token]:
                    size = (s[row, token] - t[row, token] - alpha * (g[row, token] - b[row, token])).norm()
                    terms.append(size**2 if squared else size)
    return torch.stack(terms).mean()


def with_lora(model):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 1], init_lora_weights=False)
    return get_peft_model(model, config)


def with_red(model):
    handle = fe.patch(model, fe.RED(layers=[0, 1]), freeze=True)
    with torch.no_grad():
        for number, parameter in enumerate(handle.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.2)
    return model


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("student", [with_lora, with_red])
def test_loss_and_gradients_are_the_formulas(student, dual, squared):
    base = tiny.build("llama")
    other = tiny.build("llama", num_hidden_layers=3, rope_theta=500.0)
    given = batch() if not dual else batch(("",))
    model, twin = student(copy.deepcopy(base)), student(copy.deepcopy(base))
    good, bad = (base, other) if dual else (base, base)
    expected = written_out(twin, base, good, bad, given, 5.0, squared)
    expected.backward()
    module = rahf.Rahf(model, LAYERS, rejected=other if dual else None, squared=squared).train()
    loss = module(**given)["loss"]
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    trained = [(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True) if p.requires_grad]
    assert trained and all(p.requires_grad is q.requires_grad for p, q in trained)
    for p, q in trained:
        size = float(q.grad.abs().max())
        assert size > 0
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4 * size)


def test_one_set_of_weights_serves_and_comes_back_as_it_was():
    model = with_red(tiny.build("llama")).train()
    model.model.layers[1].eval()
    handle = fe.patching.handle.handles(model)[0]
    handle.strength = 0.7
    before = copy.deepcopy(tiny.state(model))
    modes = [m.training for m in model.modules()]
    module = rahf.Rahf(model, LAYERS)
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in model.parameters())
    with pytest.raises(RuntimeError), rahf.teacher(model):
        assert not any(m.training for m in model.modules()) and handle.strength == 0.0
        raise RuntimeError
    assert handle.strength == 0.7 and modes == [m.training for m in model.modules()]
    tiny.assert_same_state(model, before)


@pytest.mark.parametrize("through", ["PeftModel", "injected", "disabled"])
def test_the_teacher_has_no_adapter_and_leaves_each_as_it_was(through):
    base = tiny.build("llama")
    model, given = with_lora(copy.deepcopy(base)), {k: v[0] for k, v in batch().items() if k != "response_mask"}
    if through == "disabled":
        model.base_model.disable_adapter_layers()
    if through == "injected":  # as transformers' add_adapter leaves it: PEFT's layers without PEFT's model around them
        model = model.get_base_model()
    next(p for p in model.parameters() if p.requires_grad or through == "disabled").requires_grad_(False)
    trained = [p.requires_grad for p in model.parameters()]
    before = model(**given).logits
    with rahf.teacher(model):
        assert torch.equal(model(**given).logits, base(**given).logits)
    assert torch.equal(model(**given).logits, before) and trained == [p.requires_grad for p in model.parameters()]
    assert torch.equal(before, base(**given).logits) is (through == "disabled")


def test_nothing_runs_behind_the_deepest_layer():
    model, ran = with_red(tiny.build("llama")), []
    for name in ("model.layers.0", "model.layers.1", "model.layers.2", "model.norm", "lm_head"):
        model.get_submodule(name).register_forward_pre_hook(lambda m, a, name=name: ran.append(name))
    rahf.Rahf(model, (1, 2))(**batch())
    assert ran == ["model.layers.0", "model.layers.1"] * 2
    assert all(not m._forward_hooks for m in model.modules())


def test_the_stream_is_the_models_hidden_states_edits_included():
    model = with_red(tiny.build("llama"))
    given = {k: v[0] for k, v in batch().items() if k != "response_mask"}
    every = model(**given, output_hidden_states=True).hidden_states
    for after, found in zip((2, 1), residual_stream(model, (2, 1), given, last=3), strict=True):
        assert torch.equal(found, every[after][:, -3:])
    for wrong in ((), (0,), (4,), (True,)):
        with pytest.raises(ValueError, match="expected numbers of blocks from 1 to 3"):
            residual_stream(model, wrong, given)


def test_hindsight_loss_is_its_formula():
    model = tiny.build("llama")
    given = batch(("good:", "bad, bad:"))
    own, opposite = ({k: v[s] for k, v in given.items() if k != "response_mask"} for s in (0, 1))
    mask, columns = given["response_mask"], given["response_mask"].shape[1]

    def mean_log_probability(inputs):
        logits = model(**inputs).logits.log_softmax(-1)
        means, every = [], []
        for row in range(2):
            terms = [logits[row, t - 1, inputs["input_ids"][row, t]]
                     for t in range(-columns, 0) if mask[row, t]]  # fmt: skip
            means.append(sum(terms) / len(terms))
            every += terms
        return torch.stack(means), -torch.stack(every).mean()

    under_own, entropy = mean_log_probability(own)
    under_opposite, _ = mean_log_probability(opposite)
    p, n = under_own.exp(), under_opposite.exp()
    expected = entropy + (-0.8 * (p / (p + n)).log() - 0.2 * (n / (p + n)).log()).mean()
    torch.testing.assert_close(rahf.hindsight_loss(model, own, opposite, mask), expected, rtol=1e-5, atol=1e-6)


def test_batches_end_with_the_same_response_under_every_stimulus():
    given = batch(response=8)
    ids, mask, response = given["input_ids"], given["attention_mask"], given["response_mask"]
    assert ids.shape == mask.shape and ids.shape[:2] == (3, 2) and response.shape == (2, 8)
    assert response.sum(1).tolist() == [6.0, 8.0]
    assert all(torch.equal(ids[0][:, -6:], ids[s][:, -6:]) for s in (1, 2))
    assert ((mask == 0) == (ids == 0)).all() and mask[:, :, -1].all()
    with pytest.raises(ValueError, match="row 1 has an empty response"):
        rahf.Collator(Letters())([ROWS[0], {"prompt": "x", "response": ""}])


def test_a_long_prompt_loses_its_beginning_and_not_the_instruction():
    letters, row = Letters(), {"prompt": "a long story, and then the question", "response": "no"}
    given = rahf.Collator(letters, ("", "good"), prompt=20)([row])
    whole = letters("good\n\n")["input_ids"]
    masked = zip(given["input_ids"], given["attention_mask"], strict=True)
    plain, instructed = (ids[0, mask[0] == 1].tolist() for ids, mask in masked)
    answer = letters("no", False)["input_ids"]
    tail = letters(row["prompt"], False)["input_ids"]
    assert plain == [1, *tail[-19:], *answer]
    assert instructed == [*whole, *tail[len(whole) - 20 :], *answer]
    with pytest.raises(ValueError, match="no room behind an instruction of 7"):
        rahf.Collator(letters, ("good",), prompt=7)([row])


def test_layers_are_the_papers_in_proportion():
    assert rahf.default_layers(32) == (10, 12, 14, 16, 18)
    assert rahf.default_layers(32, dual=True) == (10, 12, 14, 16, 18, 20)
    assert rahf.default_layers(4) == (1, 2)
    with pytest.raises(ValueError, match="from 1 to 3"):
        rahf.Rahf(tiny.build("llama"), (9,))
    with pytest.raises(ValueError, match=r"expected \(3, batch, tokens\)"):
        rahf.Rahf(tiny.build("llama"), (1,))(**batch(("",)))


@pytest.mark.parametrize("student", ["lora", "red"])
def test_training_brings_the_student_to_its_target(student):
    model = tiny.build("llama")
    if student == "lora":
        model = rahf.lora(model, LAYERS, rank=2)
        assert {n.split("layers.")[1][0] for n, p in model.named_parameters() if p.requires_grad} == {"0", "1"}
    else:
        fe.patch(model, fe.RED(layers=[0, 1]), freeze=True)
    module = rahf.Rahf(model, LAYERS)
    before = float(module.eval()(**batch())["loss"])
    collator = rahf.Collator(Letters(), ("", "good:", "bad, bad:"), 8)
    rahf.train(module, ROWS, collator, steps=30, batch_size=2, lr=2e-2)
    after = float(module.eval()(**batch())["loss"])
    assert after < 0.9 * before, (before, after)


def test_masked_norm_in_bf16_and_at_zero():
    a = torch.randn(2, 3, 8, dtype=torch.bfloat16).requires_grad_()
    zero = torch.zeros(2, 3, 8, dtype=torch.bfloat16)
    mask = torch.tensor([[1.0, 1, 0], [0, 0, 0]])
    loss = rahf.pattern_loss([a], [a.detach()], [zero], [zero], mask)
    loss.backward()
    assert loss == 0 and torch.equal(a.grad, torch.zeros_like(a)), "no NaN at a student that is there already"
    assert F.mse_loss(rahf.pattern_loss([a], [zero], [zero], [zero], mask).detach(), a[0, :2].float().norm(dim=-1).mean()) < 1e-8
