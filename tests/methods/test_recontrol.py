"""RE-Control: targets and losses against slow definitions, control against plain hooks with the autograd loop."""

import copy

import pytest
import tiny_models as tiny
import torch
from ascent_support import autograd_loop, make_net

import fastedit as fe
from fastedit.methods import recontrol

NORM = {"llama": "model.norm", "gpt2": "transformer.ln_f"}
A, N = 0.5, 30


def net_for(model, units=48, gain=4.0):
    return make_net(model.config.hidden_size, units, gain)


def hooked(model, family, net, steps=N, step_size=A):
    """A copy whose last position ascends by the autograd loop, in a plain forward hook."""
    slow = copy.deepcopy(model)

    def hook(module, args, output):
        with torch.enable_grad():
            moved, _ = autograd_loop(output[:, -1:].detach(), net, steps, step_size)
        return torch.cat([output[:, :-1], moved], 1)

    slow.get_submodule(NORM[family]).register_forward_hook(hook)
    return slow


def prompts(batch=3, length=6, side="left"):
    ids = torch.randint(3, tiny.VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if side == "left":
        mask[0, :3] = 0
    elif side == "right":
        mask[0, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, given=None, **options):
    torch.manual_seed(7)
    defaults = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    return model.generate(**(prompts() if given is None else given), **(defaults | options))


def read_by_head(model):
    """A list that gets what the LM head reads for each next token."""
    found = []
    model.lm_head.register_forward_pre_hook(lambda m, args: found.append(args[0][:, -1]))
    return found


# --- targets and training -----------------------------------------------------------------------------------------------


def slow_targets(values, lengths, rewards, lam):
    """λ-returns by their definition, a number at a time: (1 − λ) Σ λ^k (k+1)-step returns, and what is left of it on r."""
    targets, start = [], 0
    for length, reward in zip(lengths, rewards, strict=True):
        own = values[start : start + length]
        for t in range(length):
            left, target = 1.0, 0.0
            for ahead in range(t + 1, length):
                target += left * (1 - lam) * own[ahead]
                left *= lam
            targets.append(target + left * reward)
        start += length
    return targets


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("lengths", [[1], [5], [1, 1, 1], [4, 1, 9, 2], [2, 7, 7, 1]])
def test_targets_and_loss_are_their_definition(lengths, lam):
    values = torch.randn(sum(lengths), dtype=torch.float64, requires_grad=True)
    rewards = torch.randn(len(lengths), dtype=torch.float64)
    slow = slow_targets(values.tolist(), lengths, rewards.tolist(), lam)
    found = recontrol.td_targets(values, torch.tensor(lengths), rewards, lam)
    torch.testing.assert_close(found, torch.tensor(slow, dtype=torch.float64), rtol=1e-13, atol=1e-14)
    loss = recontrol.td_loss(values, torch.tensor(lengths), rewards, lam)
    apart = [v - t for v, t in zip(values.tolist(), slow, strict=True)]
    assert loss.item() == pytest.approx(sum(d * d for d in apart) / len(apart), rel=1e-12)
    loss.backward()  # the targets are constants to it
    expected = torch.tensor([2 * d / len(apart) for d in apart], dtype=torch.float64)
    torch.testing.assert_close(values.grad, expected, rtol=1e-12, atol=1e-14)


def test_the_reward_is_at_the_last_valid_step():
    values = torch.zeros(6)
    found = recontrol.td_targets(values, torch.tensor([4, 2]), torch.tensor([1.0, 2.0]))
    assert found.tolist() == [0, 0, 0, 1, 0, 2]


def made(count=60, width=6, seed=0):
    """Trajectories whose reward is in every one of their states."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (count,), generator=generator)
    rewards = torch.randn(count, generator=generator)
    states = torch.randn(int(lengths.sum()), width, generator=generator)
    states[:, 0] = rewards.repeat_interleave(lengths)
    return recontrol.Trajectories(states, lengths, rewards)


def fresh(width=6, units=32, seed=0):
    torch.manual_seed(seed)
    return fe.ValueNet(width, units)


@pytest.mark.parametrize(("lam", "units"), [(0.0, 32), (0.9, 32), (0.9, (32, 16))])
def test_fit_finds_the_reward_and_gives_the_same_bits_again(lam, units):
    nets, data = [fresh(units=units).requires_grad_(False) for _ in range(2)], made()
    told = []
    fits = [
        recontrol.fit(net, data, lam=lam, lr=1e-2, batch_size=16, progress=lambda *at: told.append(at)) for net in nets
    ]
    first = fits[0].epochs[0]["error"]
    assert fits[0].error < 0.1 * first, (first, fits[0].error)
    assert fits[0].error == min(row["error"] for row in fits[0].epochs) and told[0] == (1, 100)
    assert fits[0] == fits[1] and not any(p.requires_grad for p in nets[0].parameters())
    assert all(torch.equal(p, q) for p, q in zip(*(net.parameters() for net in nets), strict=True))


def test_fit_keeps_the_best_epoch_and_stops():
    data = made()
    data.rewards = torch.randn(len(data))  # noise: sooner or later the held-out error only grows
    assert repr(data) == f"Trajectories(60 responses, {len(data.states)} states of width 6)"
    net = fresh()
    found = recontrol.fit(net, data, lr=3e-2, batch_size=8, patience=4)
    assert len(found.epochs) - 1 == found.best + 4 < 100
    _, test = recontrol._split(len(data), 0.1, 0)
    again = recontrol._Data(data, torch.device("cpu")).measure(net, test, 0.0, 512)
    assert again["error"] == pytest.approx(found.error, rel=1e-6)


def test_what_fit_refuses_leaves_the_net():
    net, data = fresh(), made()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="reads states of width 5, and these are 6"):
        recontrol.fit(fresh(5), data)
    with pytest.raises(TypeError, match="expected a fastedit"):
        recontrol.fit(torch.nn.Linear(6, 1), data)
    for wrong in ({"lam": 1.5}, {"held_out": 1.0}, {"epochs": 0}, {"epochs": 2.5}):
        with pytest.raises(ValueError, match="expected"):
            recontrol.fit(net, data, **wrong)
    with pytest.raises(ValueError, match="too few to hold some out"):
        recontrol.fit(net, made(1))
    with pytest.raises(RuntimeError, match="lower lr"):
        recontrol.fit(net, data, lr=1e30, epochs=5)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# --- trajectories -------------------------------------------------------------------------------------------------------


class Numbers:
    """A tokenizer of numbers between spaces."""

    pad_token_id, bos_token_id, eos_token_id, chat_template = 0, None, None, None

    def __call__(self, text, **options):
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(str(int(i)) for i in ids if i > 2)


ASKED = ["5 9 12", "7", "30 31 32 33 34", "8 8"]


def length_reward(prompts, responses):
    return [float(len(response.split())) for response in responses]


def test_states_are_what_the_head_read_for_each_token():
    model = tiny.build("llama").train()
    seen = read_by_head(model)
    random_state = torch.get_rng_state()
    found = recontrol.collect(model, Numbers(), ASKED, length_reward, temperature=0, max_new_tokens=8, batch_size=4)
    assert model.training and torch.equal(torch.get_rng_state(), random_state)
    said, kept = [[int(w) for w in response.split()] for response in found.responses], found.states.split(found.lengths.tolist())
    for row, (tokens, states) in enumerate(zip(said, kept, strict=True)):
        assert torch.equal(states, torch.stack([s[row] for s in seen[: len(states)]]))
        chosen = model.lm_head(states).argmax(-1).tolist()
        assert [token for token in chosen if token > 2] == tokens
    assert found.rewards.tolist() == [float(len(tokens)) for tokens in said] and found.prompts == ASKED


def test_a_response_ends_with_the_token_that_ends_it():
    model = tiny.build("llama")
    free = recontrol.collect(model, Numbers(), ASKED, length_reward, temperature=0, max_new_tokens=8)
    end = model.lm_head(free.states[4]).argmax().item()
    cut = recontrol.collect(model, Numbers(), ASKED, length_reward, temperature=0, max_new_tokens=8, eos_token_id=end)
    assert cut.lengths[0] <= 5 and cut.lengths.max() <= 8 and len(cut.states) == int(cut.lengths.sum())
    whole = [model.lm_head(states).argmax(-1).tolist() for states in free.states.split(free.lengths.tolist())]
    expected = [tokens.index(end) + 1 if end in tokens else 8 for tokens in whole]
    assert cut.lengths.tolist() == expected


def test_the_same_seed_gives_the_same_samples():
    model = tiny.build("gpt2")
    found = [
        recontrol.collect(model, Numbers(), ASKED, length_reward, samples=2, max_new_tokens=4, batch_size=3, seed=s)
        for s in (1, 1, 2)
    ]
    assert found[0].prompts == [p for p in ASKED for _ in range(2)] and len(found[0]) == 8
    assert torch.equal(found[0].states, found[1].states) and found[0].responses == found[1].responses
    assert found[0].responses != found[2].responses


def test_what_collect_refuses():
    model = tiny.build("llama")
    ask = {"max_new_tokens": 4, "temperature": 0}
    for wrong in (lambda p, r: [1.0], lambda p, r: [float("nan")] * len(r), lambda p, r: ["good"] * len(r)):
        with pytest.raises(ValueError, match="expected one finite number for each"):
            recontrol.collect(model, Numbers(), ASKED, wrong, **ask)
    with pytest.raises(ValueError, match="prompts is empty"):
        recontrol.collect(model, Numbers(), [], length_reward)
    with pytest.raises(TypeError, match="expected a function"):
        recontrol.collect(model, Numbers(), ASKED, "dog")
    with pytest.raises(ValueError, match="no beams"):
        recontrol.collect(model, Numbers(), ASKED, length_reward, num_beams=2, **ask)
    with pytest.raises(ValueError, match="encoder-decoder"):
        recontrol.collect(tiny.build("t5"), Numbers(), ASKED, length_reward)
    assert all(not m._forward_hooks for m in model.modules())


def test_trajectories_go_to_a_file_and_back(tmp_path):
    data = made(5)
    data.states, data.prompts, data.responses = data.states.bfloat16(), ["a"] * 5, list("bcdef")
    data.save(tmp_path / "some.safetensors")
    again = recontrol.Trajectories.load(tmp_path / "some.safetensors")
    assert torch.equal(again.states, data.states) and torch.equal(again.rewards, data.rewards)
    assert torch.equal(again.lengths, data.lengths) and again.responses == data.responses
    content = (tmp_path / "some.safetensors").read_bytes()
    (tmp_path / "some.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(fe.EditFileError, match="holds no trajectories"):
        recontrol.Trajectories.load(tmp_path / "some.safetensors")
    with pytest.raises(ValueError, match="lengths sum to 3"):
        recontrol.Trajectories(torch.zeros(2, 4), torch.tensor([1, 2]), torch.zeros(2))
