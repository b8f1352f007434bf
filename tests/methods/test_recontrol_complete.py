"""States in shards, resumed and by several processes; the authors' files; what RE-Control is compared with; trained rewards."""

import itertools
import os
import resource

import pytest
import tiny_models as tiny
import torch
from chat_tokenizers import tokenizer_of
from torch import nn

import fastedit as fe
from fastedit import training
from fastedit.files.edit_file import EditFileError
from fastedit.methods import recontrol, recontrol_report
from fastedit.methods.trajectories import Trajectories, shard
from fastedit.texts.chat import render
from fastedit.training.rewards import RewardTrainer, ranked, spread_of

PROMPTS = ["ab", "c", "dd e", "f", "gh"]
ASK = {"samples": 2, "max_new_tokens": 5, "batch_size": 2, "seed": 3}


def model_of():
    torch.manual_seed(0)
    return tiny.build("llama", vocab_size=130, eos_token_id=129).eval()


def count_a(prompts, responses):
    return [float(text.count("a") + len(text) / 10) for text in responses]


def same(a, b):
    assert torch.equal(a.states, b.states) and torch.equal(a.lengths, b.lengths) and torch.equal(a.rewards, b.rewards)
    assert (a.prompts, a.responses) == (b.prompts, b.responses)


def test_shards_resumed_or_by_two_processes_are_the_whole(tmp_path):
    model, tokenizer = model_of(), tokenizer_of()
    whole = recontrol.collect(model, tokenizer, PROMPTS, count_a, **ASK)
    assert whole.prompts == [p for p in PROMPTS for _ in range(2)]
    same(recontrol.collect(model, tokenizer, PROMPTS, count_a, folder=tmp_path / "one", **ASK), whole)
    calls = []

    def breaks(prompts, responses):
        calls.append(prompts)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return count_a(prompts, responses)

    with pytest.raises(KeyboardInterrupt):
        recontrol.collect(model, tokenizer, PROMPTS, breaks, folder=tmp_path / "two", **ASK)
    with pytest.raises(EditFileError, match="lacks 2 of 3 shards, states-00001"):
        Trajectories.load(tmp_path / "two")
    same(recontrol.collect(model, tokenizer, PROMPTS, breaks, folder=tmp_path / "two", **ASK), whole)
    assert len(calls) == 4, "the shard that was there is not made again"
    assert recontrol.collect(model, tokenizer, PROMPTS, count_a, folder=tmp_path / "three", part=(1, 2), **ASK) is None
    same(recontrol.collect(model, tokenizer, PROMPTS, count_a, folder=tmp_path / "three", part=(0, 2), **ASK), whole)


def test_a_torn_shard_and_other_settings_are_refused(tmp_path):
    model, tokenizer = model_of(), tokenizer_of()
    recontrol.collect(model, tokenizer, PROMPTS, count_a, folder=tmp_path, **ASK)
    with pytest.raises(EditFileError, match="collected for other prompts or settings"):
        recontrol.collect(model, tokenizer, PROMPTS, count_a, folder=tmp_path, **ASK | {"seed": 4})
    torn = shard(tmp_path, 1)
    torn.write_bytes(torn.read_bytes()[:-10])
    with pytest.raises(EditFileError, match=r"states-00001\.safetensors holds no trajectories"):
        Trajectories.load(tmp_path)
    for part in ((2, 2), (0, 0), (0,)):
        with pytest.raises(ValueError, match=r"expected \(number, of how many"):
            recontrol.collect(model, tokenizer, PROMPTS, count_a, folder=tmp_path, part=part, **ASK)
    with pytest.raises(ValueError, match="part needs a folder"):
        recontrol.collect(model, tokenizer, PROMPTS, count_a, part=(0, 2), **ASK)


class Released(nn.Module):
    """Layers by the names of the authors' files."""

    def __init__(self, *sizes):
        super().__init__()
        for number, (m, n) in enumerate(itertools.pairwise(sizes), 1):
            self.add_module(f"fc{number}", nn.Linear(m, n))

    def forward(self, x):
        layers = list(self.children())
        for layer in layers[:-1]:
            x = torch.relu(layer(x))
        return layers[-1](x)


@pytest.mark.parametrize("sizes", [(32, 48, 1), (32, 48, 24, 1), (32, 16, 16, 8, 5)])
def test_the_authors_files_load(sizes, tmp_path):
    torch.manual_seed(0)
    made, states = Released(*sizes), torch.randn(5, 32)
    torch.save({f"module.{k}": v for k, v in made.state_dict().items()}, tmp_path / "net.pth")
    net = fe.ValueNet.from_released(tmp_path / "net.pth")
    torch.testing.assert_close(net(states), made(states)[:, 0] if sizes[-1] == 1 else made(states))
    torch.save(Released(32, 8, 8, 8, 8, 1).state_dict(), tmp_path / "deep.pth")
    with pytest.raises(ValueError, match="expected weight and bias of fc1, fc2"):
        fe.ValueNet.from_released(tmp_path / "deep.pth")
    torch.save(made, tmp_path / "pickled.pth")
    with pytest.raises(ValueError, match="could not be read as a state dict"):
        fe.ValueNet.from_released(tmp_path / "pickled.pth")


def test_a_file_of_another_hand_is_refused_before_it_grows(tmp_path):
    """A pipe, a kilobyte that announces eight gigabytes, numbers of which a bit has changed."""
    os.mkfifo(tmp_path / "pipe.pth"), os.mkfifo(tmp_path / "pipe.safetensors")
    state = Released(32, 8, 1).state_dict()
    torch.save(state | {"fc1.weight": torch.ones(1).expand(1 << 16, 1 << 15)}, tmp_path / "bomb.pth")
    torch.save(state, tmp_path / "flipped.pth")
    content = bytearray((tmp_path / "flipped.pth").read_bytes())
    content[content.index(state["fc1.weight"].numpy().tobytes())] ^= 1
    (tmp_path / "flipped.pth").write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, said in (
        ("pipe.pth", "not a regular file"), ("pipe.safetensors", "not a regular file"), ("bomb.pth", "announces 2,147,483,648"),
        ("flipped.pth", "checksum of its part"),
    ):
        with pytest.raises(ValueError, match=f"could not be read as a state dict: it .*{said}"):
            fe.ValueNet.from_released(tmp_path / name)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KB


# --- three hidden layers, several outputs, target scores ----------------------------------------------------------------


def climbed(net, hidden, steps, step_size, target=None):
    """The autograd loop on what is ascended."""
    u = torch.zeros_like(hidden)
    for _ in range(steps):
        moved = (hidden + u).requires_grad_()
        values = net(moved).view(len(hidden), -1)
        height = values.sum() if target is None else -0.5 * (values - torch.tensor(target, dtype=torch.float64)).square().sum()
        (gradient,) = torch.autograd.grad(height, moved)
        u = u + step_size * gradient
    return hidden + u


@pytest.mark.parametrize("units", [12, (12, 8), (12, 8, 6)])
@pytest.mark.parametrize("outputs", [1, 3])
def test_ascents_are_those_of_the_autograd_loop(units, outputs):
    torch.manual_seed(0)
    net, hidden = fe.ValueNet(32, units, outputs=outputs), torch.randn(7, 32, dtype=torch.float64)
    target = [0.7, -0.2, 1.5][:outputs]
    for aim in (None, target) if outputs == 1 else (target,):
        found = fe.ops.value_ascent(hidden, net, 9, 0.5, aim)
        torch.testing.assert_close(found, climbed(net, hidden, 9, 0.5, aim), rtol=1e-12, atol=1e-12)
        assert fe.ops.value_ascent(hidden.float(), net, 9, 0.5, aim).dtype is torch.float32
    if outputs > 1:
        weights = [1.0, 0.0, -2.0]
        torch.testing.assert_close(net.mixed(weights)(hidden), net(hidden) @ torch.tensor(weights, dtype=torch.float64))
        with pytest.raises(ValueError, match=r"has 3 outputs: give target="):
            fe.ops.value_ascent(hidden, net, 9, 0.5)
    for wrong in ([1.0] * 4, float("nan"), ["a"] * outputs, [True] * outputs):
        with pytest.raises(ValueError, match="expected a finite number for each"):
            fe.ops.value_ascent(hidden, net, 9, 0.5, wrong)


def test_a_target_is_met_by_the_last_token_s_state_and_saved(tmp_path):
    model, given = model_of(), {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]])}
    torch.manual_seed(0)
    net, seen = fe.ValueNet(32, (24, 16, 8), outputs=3), []
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3.0)  # else three layers of fresh weights hardly depend on the state
        plain = net(model.model(**given).last_hidden_state[:, -1])
    target = [float(plain[0, 0]) + 0.3, None, float(plain[0, 2]) - 0.2]
    handle = fe.patch(model, recontrol.Control(net, 0.1, 1000, target=target))
    handle.save(tmp_path)
    fresh = model_of()
    loaded = fe.load(fresh, tmp_path)
    for patched in (model, fresh):
        with torch.no_grad():
            seen.append(net(patched.model(**given).last_hidden_state[:, -1]))
    assert torch.equal(*seen)
    torch.testing.assert_close(seen[0][:, [0, 2]], torch.tensor([target[0], target[2]]).expand(2, 2), rtol=0, atol=1e-3)
    assert recontrol.value_net(loaded).outputs == 2
    with pytest.raises(ValueError, match="leaves every output alone"):
        recontrol.Control(net, target=[None] * 3)
    header, tensors = fe.store.read(tmp_path)
    for name in ("format", "version", "tensors"):
        del header[name]
    for wrong in ([1.0], ["x", 1.0], [], 3.0):
        header["edits"][0]["target"] = wrong
        fe.store.write(tmp_path, header, tensors)
        with pytest.raises(fe.EditFileError, match=r"target|head"):
            fe.load(model_of(), tmp_path)


def test_several_rewards_are_fitted_each_on_its_own():
    model, tokenizer = model_of(), tokenizer_of()

    def both(prompts, responses):
        return [[float(text.count("a")), len(text) / 10] for text in responses]

    data = recontrol.collect(model, tokenizer, PROMPTS, both, **ASK)
    assert data.rewards.shape == (10, 2)
    values = torch.randn(len(data.states), 2)
    together = recontrol.td_targets(values, data.lengths, data.rewards, 0.9)
    for n in range(2):
        alone = recontrol.td_targets(values[:, n], data.lengths, data.rewards[:, n], 0.9)
        assert torch.equal(together[:, n], alone)
    torch.manual_seed(0)
    net = fe.ValueNet(32, (16, 16, 8), outputs=2)
    found = recontrol.fit(net, data, lam=0.9, lr=1e-2, epochs=10)
    assert found.error < found.epochs[0]["error"]
    with pytest.raises(ValueError, match=r"1 output\(s\), and the rewards are 2 number"):
        recontrol.fit(fe.ValueNet(32, 16), data)
    with pytest.raises(ValueError, match="compares one reward"):
        recontrol_report.report(None, tokenizer, PROMPTS, both, net)
    ragged = iter([[[1.0], [1.0, 2.0]] * 2] * 9)
    with pytest.raises(ValueError, match="expected one finite number for each"):
        recontrol.collect(model, tokenizer, PROMPTS, lambda p, r: next(ragged), **ASK)


def test_messages_go_through_the_template_and_rewards_get_their_text():
    model, tokenizer, seen = tiny.build("llama", vocab_size=160).eval(), tokenizer_of("smollm2"), []

    def score(prompts, responses):
        seen.append(prompts)
        return [1.0] * len(prompts)

    chats = [[{"role": "user", "content": text}] for text in ("ab", "c")]
    found = recontrol.collect(model, tokenizer, chats, score, max_new_tokens=2)
    assert seen == [["ab", "c"]] and found.prompts == chats
    written = [render(tokenizer, chat, prompt=True) for chat in chats]
    by_hand = recontrol.collect(model, tokenizer, written, score, max_new_tokens=2)
    assert torch.equal(found.states, by_hand.states)
    score.takes_messages = True
    recontrol.collect(model, tokenizer, chats, score, max_new_tokens=2)
    assert seen[-1] == chats


def reranked_slowly(model, tokenizer, prompt, net, k, weight, steps):
    """Without caches or batches: every candidate's whole text anew."""
    ids = tokenizer(prompt)["input_ids"]
    asked = len(ids)
    for _ in range(steps):
        with torch.no_grad():
            likely, tokens = model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1).topk(k)
            values = []
            for token in tokens.tolist():
                states = model(torch.tensor([[*ids, token]]), output_hidden_states=True).hidden_states[-1]
                values.append(float(net(states[0, -1])))
        ids.append(int(tokens[(likely + weight * torch.tensor(values)).argmax()]))
        if ids[-1] == model.generation_config.eos_token_id:
            break
    return tokenizer.decode(ids[asked:], skip_special_tokens=True)


def test_reranked_tokens_are_those_of_a_plain_search():
    model, tokenizer = model_of(), tokenizer_of()
    torch.manual_seed(1)
    net = fe.ValueNet(32, 16)
    with torch.no_grad():
        net.head.mul_(20)
    found = recontrol_report.rerank_tokens(
        model, tokenizer, PROMPTS, net, k=4, weight=1.0, max_new_tokens=6, batch_size=3
    )
    plain = recontrol_report.rerank_tokens(model, tokenizer, PROMPTS, net, k=4, weight=0.0, max_new_tokens=6)
    assert found == [reranked_slowly(model, tokenizer, p, net, 4, 1.0, 6) for p in PROMPTS] and found != plain


def test_the_report_measures_every_way_on_the_same_prompts():
    model, tokenizer = model_of(), tokenizer_of()
    torch.manual_seed(1)
    net = fe.ValueNet(32, 16)
    handle = fe.patch(model, recontrol.Control(net, 1.0, 3))
    rows = recontrol_report.report(handle, tokenizer, PROMPTS, count_a, net, samples=3, max_new_tokens=5, k=3)
    by = {row["way"]: row for row in rows}
    assert (
        list(by) == ["none", "control", "best of 3", "best value of 3", "tokens reranked, k = 3"]
        and handle.strength == 1.0
    )
    assert by["best of 3"]["reward"] >= by["none"]["reward"] and by["best of 3"]["responses"] == 5
    assert all(0 <= row["diversity"] <= 1 and row["log_p"] < 0 for row in rows)
    handle.remove()
    plain = recontrol.collect(model, tokenizer, PROMPTS, count_a, samples=3, max_new_tokens=5)
    assert by["none"]["reward"] == pytest.approx(float(plain.rewards.mean()))
    assert recontrol_report.table(rows).count("\n") == 5
    assert recontrol_report.best_of([1.0, 3.0, 2.0, 9.0, 5.0, 7.0], 3) == [1, 3]
    assert recontrol_report.distinct(["a b a b", "c"]) == pytest.approx(2 / 3)


PAIRS = [{"prompt": f"say {c}: ", "chosen": c * 3, "rejected": "z" * n} for n, c in enumerate("abcdefgh", 2)]
SHIFTED = [{"prompt": f"tell {c}: ", "response": d * 3} for c, d in zip("ijkl", "zmnz", strict=True)]
FAST = {"epochs": 10, "batch_size": 4, "lr": 2e-2, "use_cpu": True}


def test_a_trained_reward_ranks_saves_and_is_what_recontrol_takes(tmp_path):
    model, tokenizer = tiny.build("llama", vocab_size=160).eval(), tokenizer_of()
    ids = torch.tensor([[5, 6, 7]])
    bare = model(ids).logits
    reward = training.RewardModel(model)
    handle = fe.patch(model, fe.RED(positions="last 2"), freeze=True)
    training.fit_reward(reward, handle, tokenizer, PAIRS, **FAST)
    assert ranked(reward, tokenizer, PAIRS) == 1.0
    handle.save(tmp_path)
    fresh = training.RewardModel(tiny.build("llama", vocab_size=160).eval())
    fe.load(fresh.model, tmp_path)
    asked, said = [p["prompt"] for p in PAIRS], [p["chosen"] for p in PAIRS]
    score = reward.scorer(tokenizer)
    assert fresh.scorer(tokenizer)(asked, said) == pytest.approx(score(asked, said), abs=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, bare, rtol=0, atol=1e-5)  # a fused norm rounds in its own way
        handle.strength = 1.0
        assert (model(ids).logits - bare).abs().max() > 1e-2, "so the edit was off, and not without effect"
        handle.strength = 0.0
    found = recontrol.collect(model, tokenizer, asked[:2], score, samples=2, max_new_tokens=3)
    assert found.rewards.isfinite().all() and len(found) == 4
    assert score(["say a: "], [""])[0] == pytest.approx(score(["say a: "], [""])[0])
    handle.remove()
    reward.remove()
    assert not hasattr(model, "score")


def test_metarm_s_step_is_the_gradient_at_the_moved_weights(tmp_path):
    from transformers import TrainingArguments

    from fastedit.training.batches import Padded
    from fastedit.training.responses import encode_pairs

    model, tokenizer = tiny.exact(tiny.build("llama", vocab_size=160)).eval(), tokenizer_of()
    reward = training.RewardModel(model)
    handle = fe.patch(model, fe.RED(), freeze=True)
    batch = Padded(0)(encode_pairs(tokenizer, PAIRS[:2]))
    shifted = [{"ids": [5, 6, n], "prompt": 0} for n in range(7, 11)]
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    trainer = RewardTrainer(
        reward=reward,
        shifted=shifted,
        ascent=0.5,
        handle=handle,
        args=args,
        data_collator=Padded(0),
        train_dataset=PAIRS,
    )
    trainer.current_gradient_accumulation_steps = 1
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    trainer.training_step(model, dict(batch))
    got = [p.grad.clone() for p in trained]
    assert all(torch.equal(p, b) for p, b in zip(trained, before, strict=True))
    moved = Padded(0)(shifted)
    rewards = reward(moved["input_ids"], moved["attention_mask"])["rewards"]
    apart = [torch.sigmoid((rewards[i] - rewards[j]).abs()) for i in range(4) for j in range(i + 1, 4)]
    torch.testing.assert_close(spread_of(rewards), torch.stack(apart).mean())
    grads = torch.autograd.grad(torch.stack(apart).mean(), trained)
    with torch.no_grad():
        for parameter, grad in zip(trained, grads, strict=True):
            parameter.add_(grad, alpha=0.5)
    chosen, rejected = reward(batch["input_ids"], batch["attention_mask"])["rewards"].chunk(2)
    expected = torch.autograd.grad(-torch.nn.functional.logsigmoid(chosen - rejected).mean(), trained)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_bad_rewards_are_refused():
    model = tiny.build("llama", vocab_size=160)
    reward = training.RewardModel(model)
    with pytest.raises(ValueError, match="has a head `score` already"):
        training.RewardModel(model)
    other = fe.patch(tiny.build("llama", vocab_size=160), fe.RED(), freeze=True)
    with pytest.raises(ValueError, match=r"not on the reward's model"):
        training.fit_reward(reward, other, tokenizer_of(), PAIRS)
    handle = fe.patch(model, fe.RED(), freeze=True)
    for given in ({"shifted": SHIFTED}, {"ascent": 0.1}, {"shifted": SHIFTED[:1], "ascent": 0.1}):
        with pytest.raises(ValueError, match="MetaRM needs two or more shifted rows"):
            training.fit_reward(reward, handle, tokenizer_of(), PAIRS, **given)
