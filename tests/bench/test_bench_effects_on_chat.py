"""The studies of the chat model (bench/effects), each run on a tiny random one; figures are the studies' own business."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import tiny_chat
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import fastedit as fe  # noqa: E402
from bench import report  # noqa: E402
from bench.effects import (  # noqa: E402
    aligned,
    chat,
    concepts,
    detectors,
    gated,
    onchat,
    preferred,
    roles,
    statistics,
    traits,
    truth,
    valued,
)  # fmt: skip
from fastedit import examples  # noqa: E402
from fastedit.methods import rahf  # noqa: E402
from fastedit.texts.chat import prompt_ids  # noqa: E402


@pytest.fixture
def tiny(monkeypatch):
    """A tiny random chat model that knows the studies' words; replies of three tokens, doses on two continuations."""
    more = [path.read_text() for path in chat.TEXTS.glob("*.txt")]
    more += [chat.ASKING["mood"], preferred.SYSTEM, gated.ASKED, roles.ROLE, roles.ORDER, rahf.GOOD, rahf.BAD]
    for module in (onchat, preferred, gated, valued, roles, traits):
        monkeypatch.setattr(module, "TOKENS", 3)
    for module in (onchat, traits):
        monkeypatch.setattr(module, "CONTINUED", 2)
    return tiny_chat.build(3, more)


def table(part, path, lines):
    """The part's table, with as many columns in each line."""
    found = part.markdown(path).splitlines()
    assert len(found) == lines and len({line.count("|") for line in found}) == 1, found
    return "\n".join(found)


def unchanged(path, run):
    """A second run measures nothing."""
    before = path.read_text()
    run()
    assert path.read_text() == before


def rows_of(part, path):
    return {tuple(row[name] for name in part.KEYS): row for row in part.Rows(path, part.KEYS, part.FIELDS).read()}


def test_auroc_is_the_share_of_pairs():
    high, low = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.0, 2.0])
    assert statistics.auroc(high, low) == pytest.approx((2 + 1 + 1.5) / 6)
    assert statistics.auroc(low - 10, high) == 0


def test_preferences_train_on_one_half_and_are_judged_on_the_other(tiny, tmp_path, monkeypatch):
    for fold in preferred.FOLDS:
        train, held, asked, kept = preferred.dealt(fold)
        assert len(train) == len(held) == 20 and not {r["chosen"] for r in train} & {r["chosen"] for r in held}
        assert not set(asked) & set(kept) and {r["prompt"][-1]["content"] for r in held} <= set(kept)
        assert {r["prompt"][-1]["content"] for r in train} <= set(asked)
    held = [preferred.dealt(fold)[1] for fold in preferred.FOLDS]
    assert {r["chosen"] for some in held for r in some} == set(examples.lines(examples.SAD))
    whole = preferred.dealt
    monkeypatch.setattr(preferred, "dealt", lambda fold, system=None: tuple(part[:4] for part in whole(fold, system)))
    for name, value in (("LAYER", 1), ("STEPS", 3), ("FOLDS", (0,)), ("RATES", {"red": 2e-2, "vector": 2e-3})):
        monkeypatch.setattr(preferred, name, value)
    preferred.run(tmp_path, tiny)
    path = tmp_path / "effects-preferred.csv"
    rows = rows_of(preferred, path)
    assert set(rows) == {(name, "0") for name in preferred.CONDITIONS} and not fe.patching.handle.handles(tiny[0])
    found = {name: torch.tensor(json.loads(rows[name, "0"]["margins"])) for name in preferred.CONDITIONS}
    assert not torch.equal(found["dpo red"], found["none"]) and not torch.equal(found["dpo red"], found["dpo red shuffled"])
    up, down = (found[f"bipo vector{sign}"] - found["none"] for sign in ("", " -1"))
    assert (up * down).sum() < 0  # the other way at strength −1
    assert float(rows["random", "0"]["kl"]) == pytest.approx(float(rows["dpo vector", "0"]["kl"]), rel=0.11)
    assert float(rows["none", "0"]["kl"]) == 0
    text = table(preferred, path, 2 + len(preferred.CONDITIONS))
    assert "not run" not in text
    unchanged(path, lambda: preferred.run(tmp_path, (None, None)))
    kept = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in kept if not line.startswith("bipo vector -1")))
    preferred.run(tmp_path, tiny)  # stopped between the two signs
    again = rows_of(preferred, path)
    assert again.keys() == rows.keys() and again["bipo vector -1", "0"]["margins"] == rows["bipo vector -1", "0"]["margins"]


def test_answers_behind_one_question_have_their_own_probabilities(tiny):
    model, tokenizer = tiny
    question, answers = "How was your weekend?", ["We danced all the way home.", "The sun", "I feel lonely"]
    found = truth.log_ps(model, tokenizer, question, answers)
    before = prompt_ids(tokenizer, onchat.as_chats([question])[0])
    for answer in answers:
        ids = before + tokenizer(answer, add_special_tokens=False)["input_ids"]
        said = model(torch.tensor([ids])).logits[0, len(before) - 1 : -1].log_softmax(-1)
        alone = said.gather(1, torch.tensor(ids[len(before) :])[:, None]).sum().item()
        assert found[answer] == pytest.approx(alone, abs=1e-4)


def test_a_question_is_judged_by_its_own_answers():
    one = {"mc1_targets": {"a": 1, "b": 0}, "mc2_targets": {"a": 1, "c": 1, "b": 0}}
    logs = {"a": -1.0, "b": -2.0, "c": -3.0}
    mc1, mc2 = truth.judged(one, logs)
    weights = {name: torch.tensor(v).exp().item() for name, v in logs.items()}
    assert mc1 == 1 and mc2 == pytest.approx((weights["a"] + weights["c"]) / sum(weights.values()))
    assert truth.judged(one, {**logs, "b": -0.5})[0] == 0


def test_truth_is_measured_for_each_edit(tiny, tmp_path, monkeypatch):
    sad = examples.lines(examples.SAD)
    asked = [
        {"question": prompt, "mc1_targets": {a: 1, b: 0}, "mc2_targets": {a: 1, c: 1, b: 0}}
        for prompt, a, b, c in zip(examples.lines(examples.PROMPTS), sad, sad[1:], sad[2:], strict=False)
    ]
    (tmp_path / "data" / "truthfulqa").mkdir(parents=True)
    (tmp_path / "data" / "truthfulqa" / "mc_task.json").write_text(json.dumps(asked))
    monkeypatch.setattr(truth, "QUESTIONS", 5)
    monkeypatch.setattr(preferred, "STEPS", 1)
    truth.run(tmp_path, tmp_path, tiny)
    path = tmp_path / "effects-truth.csv"
    rows = rows_of(truth, path)
    assert {(edit, int(seed)) for edit, seed in rows} == set(truth.PLAN) and {row["questions"] for row in rows.values()} == {"5"}
    for edit, seed in (("direction", "0"), ("random", "0"), ("random", "1")):
        assert float(rows[edit, seed]["kl"]) == pytest.approx(truth.DOSE, rel=0.11)
    assert "not run" not in table(truth, path, 2 + len(truth.PLAN))
    unchanged(path, lambda: truth.run(tmp_path, tmp_path, (None, None)))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]))
    assert truth.markdown(path).count("not run") == len(truth.PLAN) - 1


def axbench(folder):
    """A folder of --data whose concepts are told by the last word of the same sentence."""
    (folder / "data" / "axbench").mkdir(parents=True)
    for name, count in (("train", 6), ("eval", 5)):
        rows, asked = [], itertools.cycle(examples.lines(examples.PROMPTS))

        def row(concept, category, ending, rows=rows, asked=asked):
            rows.append({
                "concept_id": concept, "category": category, "concept_genre": "text", "input": next(asked),
                "output": f"The sun came out and {ending}",
            })  # fmt: skip

        for _ in range(count):
            for concept, word in enumerate(("joy.", "grief.")):
                row(concept, "positive", word)
                if name == "eval":
                    row(concept, "negative", "home.")
            if name == "train":
                row(-1, "negative", "home.")
        if name == "eval":
            row(0, "hard negative", "grief.")
        path = folder / "data" / "axbench" / f"concept10_{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")


def test_concepts_are_found_by_direction_and_not_by_chance(tiny, tmp_path, monkeypatch):
    axbench(tmp_path)
    for name, value in (("CONCEPTS", 2), ("BLOCKS", (1, 2)), ("SEEDS", (0, 1))):
        monkeypatch.setattr(concepts, name, value)
    before = {name: parameter.detach().clone() for name, parameter in tiny[0].named_parameters()}
    concepts.run(tmp_path, tmp_path, tiny)
    path = tmp_path / "effects-concepts.csv"
    rows = rows_of(concepts, path)
    assert len(rows) == len(concepts.plan()) == 2 * (3 + 2 * 2) + 2
    for row in rows.values():
        assert len(json.loads(row["auroc"])) == 2 and len(json.loads(row["hard"])) == 1  # one concept has hard negatives
    assert sum(json.loads(rows["logistic", "1", "0"]["auroc"])) > 1.5
    for name, parameter in tiny[0].named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.requires_grad and parameter.grad is None, name
    table(concepts, path, 2 + len(concepts.METHODS))
    unchanged(path, lambda: concepts.run(tmp_path, tmp_path, (None, None)))


def test_what_is_trained_finds_the_texts_that_say_the_concept(tiny, monkeypatch):
    """With its own v added, a text that holds the concept is likelier; what it learns is no more than a direction."""
    model, tokenizer = tiny
    asked = examples.lines(examples.PROMPTS)[:8]
    sides = [
        concepts.encoded(tokenizer, [{"input": one, "output": f"The sun came out and {word}"} for one in asked])
        for word in ("joy.", "home.")
    ]
    monkeypatch.setattr(detectors, "EPOCHS", 20)
    v, again = (detectors.reft_r1(model, *sides, 2, 0) for _ in range(2))
    assert torch.equal(v, again) and v.norm().item() == pytest.approx(1, abs=1e-6)
    monkeypatch.setattr(detectors, "EPOCHS", 0)
    start = detectors.reft_r1(model, *sides, 2, 0)
    likely = {}
    for name, direction in (("start", start), ("trained", v)):
        with fe.patch(model, fe.Steer(8 * direction.float(), site="block", layers=1)):
            likely[name] = detectors._likely(model, sides[0]).mean().item()
    assert likely["trained"] > likely["start"] + 0.1, likely
    assert not model.model.layers[1]._forward_hooks
    monkeypatch.setattr(detectors, "EPOCHS", 20)
    others = concepts.encoded(tokenizer, [{"input": one, "output": "I feel lonely, nobody calls any more"} for one in asked])
    gains = detectors.red_gain(model, sides[0], [*sides[0], *others], 2, 0)
    assert (gains[:8] > gains[8:] + 0.5).all() and gains[:8].min() > 0, gains  # of the same prompts


def test_states_are_those_of_the_answer(tiny):
    model, tokenizer = tiny
    row = {"input": "How was your weekend?", "output": "The sun came out and everyone in the square began to smile."}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(concepts, "BLOCKS", (1, 3))
        both = concepts.read(model, concepts.encoded(tokenizer, [row, {**row, "output": "The sun"}]))
    ids = prompt_ids(tokenizer, onchat.as_chats([row["input"]])[0])
    said = tokenizer("The sun", add_special_tokens=False)["input_ids"]
    states = model(torch.tensor([ids + said]), output_hidden_states=True).hidden_states
    torch.testing.assert_close(both[1][0][: len(said)], states[1][0, len(ids) :], rtol=1e-4, atol=1e-5)


def test_gates_are_judged_on_prompts_held_out(tiny, tmp_path, monkeypatch):
    fitted, held = gated.dealt(0)
    assert [len(some) for some in (*fitted, *held)] == [12] * 4 and not set(fitted[0]) & set(held[0])
    for name, value in (("FOLDS", (0,)), ("EPOCHS", 1), ("LAYERS", (1, 2)), ("NATS", 0.05), ("CAST_NATS", 0.05)):
        monkeypatch.setattr(gated, name, value)
    part = [some[:6] for some in fitted], [some[:2] for some in held]
    monkeypatch.setattr(gated, "dealt", lambda fold: part)
    gated.run(tmp_path, tiny)
    path = tmp_path / "effects-gated.csv"
    rows = rows_of(gated, path)
    assert set(rows) == {(*cell, "0") for cell in gated.CELLS} and not fe.patching.handle.handles(tiny[0])
    assert all(0 <= float(row["auroc"]) <= 1 for row in rows.values() if row["auroc"])
    assert "not run" not in table(gated, path, 2 + len(gated.CELLS))
    unchanged(path, lambda: gated.run(tmp_path, (None, None)))
    assert gated.refuses("I am Sorry.") and not gated.refuses("Run three times a week.")


def test_a_value_net_and_its_baselines_have_the_same_random_numbers(tiny, tmp_path, monkeypatch):
    assert valued.reward(None, ["joy and joy", "grief", ""]) == [2.0, -1.0, 0.0]
    for name, value in (("SEEDS", (0,)), ("FITTED", 26), ("LEARNT", 2), ("SAMPLES", 2), ("UNITS", 8), ("DOSE", 0.05)):
        monkeypatch.setattr(valued, name, value)
    monkeypatch.setattr(valued, "reward", lambda prompts, responses: [text.count("e") / 4 for text in responses])
    valued.run(tmp_path, tiny)
    path = tmp_path / "effects-valued.csv"
    rows = rows_of(valued, path)
    assert set(rows) == {(way, "0") for way in valued.WAYS}
    reward = {way: json.loads(rows[way, "0"]["rewards"]) for way in valued.WAYS}
    assert {len(some) for some in reward.values()} == {6}
    assert all(best >= plain for best, plain in zip(reward["best"], reward["none"], strict=True))
    assert rows["none", "0"]["replies"] == "12" and rows["best", "0"]["replies"] == "6"
    net = fe.ValueNet(32, 8)
    states = torch.randn(50, 32)
    strength = valued.strength_of(tiny[0], net.requires_grad_(False), states, 0)
    logits = [tiny[0].lm_head(some).log_softmax(-1) for some in (states, fe.ops.value_ascent(states, net, 30, 0.5 * strength))]
    kl = torch.nn.functional.kl_div(logits[1], logits[0], log_target=True, reduction="none").sum(-1).mean()
    assert kl.item() == pytest.approx(valued.DOSE, rel=1e-2)
    assert "not run" not in table(valued, path, 2 + len(valued.WAYS))
    unchanged(path, lambda: valued.run(tmp_path, (None, None)))


def test_roles_are_judged_by_refusals_on_the_other_half(tiny, tmp_path, monkeypatch):
    fitted, judged = roles.dealt(0)
    assert [len(some) for some in (*fitted, *judged)] == [12] * 4
    assert not set(fitted[0] + fitted[1]) & set(judged[0] + judged[1])
    monkeypatch.setattr(roles, "FOLDS", (0,))
    monkeypatch.setattr(roles, "dealt", lambda fold: [[some[:4] for some in part] for part in (fitted, judged)])
    roles.run(tmp_path, tiny)
    path = tmp_path / "effects-roles.csv"
    rows = rows_of(roles, path)
    assert set(rows) == {(edit, "0") for edit in roles.NAMES}
    assert float(rows["random 0.4", "0"]["kl"]) == pytest.approx(0.4, rel=0.11) and float(rows["0.2", "0"]["strength"]) > 0
    assert "not run" not in table(roles, path, 2 + len(roles.NAMES))
    unchanged(path, lambda: roles.run(tmp_path, (None, None)))


def test_a_lexicon_is_weighed_to_its_dose(tiny, tmp_path, monkeypatch):
    happy, other = (traits.words_of(name, 0) for name in ("happy", "other"))
    assert sorted(happy.values()) == sorted(other.values()) and not set(happy) & set(other) and "joy" in happy
    monkeypatch.setattr(traits, "SEEDS", (0,))
    monkeypatch.setattr(traits, "DOSES", (0.2,))
    traits.run(tmp_path, tiny)
    path = tmp_path / "effects-traits.csv"
    rows = rows_of(traits, path)
    assert set(rows) == {("none", "0", "0"), ("happy", "0.2", "0"), ("other", "0.2", "0"), ("asked", "0", "0")}
    assert float(rows["happy", "0.2", "0"]["weight"]) > 0 == float(rows["none", "0", "0"]["weight"])
    assert "not run" not in table(traits, path, 2 + len(traits.plan()))
    unchanged(path, lambda: traits.run(tmp_path, (None, None)))


def test_a_processor_at_its_weight_has_the_kl_that_was_asked_for(tiny):
    from fastedit.methods import ubpl

    model, tokenizer = tiny
    chats = onchat.as_chats(examples.lines(examples.PROMPTS)[:2])
    made = ubpl.UBPL(tokenizer, {"trait": {"joy.": 1.0, "the": 0.5}}, {"trait": 1.0})
    weight = traits.weight_of(model, tokenizer, made, chats, 0.3)
    made.set({"trait": weight})
    total = []
    for given, text in zip(chats, chat.sampled(model, tokenizer, chats, 0, 3), strict=True):
        before, behind = prompt_ids(tokenizer, given), tokenizer(text, add_special_tokens=False)["input_ids"]
        logits = model(torch.tensor([before + behind])).logits[0, len(before) - 1 :]
        p, q = logits.log_softmax(-1), made(None, logits).log_softmax(-1)
        total += torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).tolist()
    assert sum(total) / len(total) == pytest.approx(0.3, rel=1e-3)


def test_rahf_s_margins_are_of_pairs_held_out(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(aligned, "FOLDS", (0, 1))
    monkeypatch.setattr(aligned, "TAUGHT", {"steps": 2, "lr": 1e-2})
    monkeypatch.setattr(aligned, "STEPS", {"steps": 1, "lr": 5e-3})
    before = {name: p.clone() for name, p in tiny[0].named_parameters()}
    aligned.run(tmp_path, tiny)
    path = tmp_path / "effects-aligned.csv"
    rows = rows_of(aligned, path)
    assert len(rows) == 4 and all(torch.equal(before[name], p) for name, p in tiny[0].named_parameters())
    for labels in ("true", "shuffled"):
        base = [value for fold in "01" for value in json.loads(rows[labels, fold]["base"])]
        assert len(base) == 24
    assert rows["true", "0"]["base"] == rows["shuffled", "0"]["base"] != rows["true", "0"]["teacher"]
    assert rows["true", "0"]["student"] not in (rows["true", "0"]["teacher"], rows["shuffled", "0"]["student"])
    assert "not run" not in table(aligned, path, 2 + 5)
    unchanged(path, lambda: aligned.run(tmp_path, (None, None)))


def test_the_page_has_every_study_s_table():
    text = report.EFFECTS.read_text()
    for name in ("preferred", "truth", "concepts", "gated", "valued", "aligned", "roles", "traits"):
        assert f"<!-- table: {name} -->" in text, name
