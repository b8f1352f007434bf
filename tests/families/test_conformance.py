"""The conformance suite: its committed table, and a few of its classes run anew. All of them: make conformance."""

from pathlib import Path

import pytest
import transformers

from bench.conformance import COMPILED, classes, measure
from bench.conformance.__main__ import OUT, OUT_COMPILED, rows_of
from bench.conformance.page import PAGE, counts, page

INDUCTOR = 12  # of COMPILED, those that were run: may only grow
FLOOR = {"causal": 175, "seq2seq": 35, "encoder": 41, "vision": 13, "vlm": 51}  # classes that are right at `block`: may only grow
SAMPLE = {
    "Qwen3_5ForCausalLM": "causal", "JambaForCausalLM": "causal", "XLNetLMHeadModel": "causal", "AlbertForMaskedLM": "encoder",
    "BartForConditionalGeneration": "seq2seq", "ViTForImageClassification": "vision",
}  # fmt: skip


_LINES = Path("constraints.txt").read_text(encoding="utf-8").splitlines()
PINNED = next(line.partition("==")[2] for line in _LINES if line.startswith("transformers=="))


@pytest.fixture(scope="module")
def rows():
    return list(rows_of(OUT).values())


@pytest.fixture(scope="module")
def compiled():
    return list(rows_of(OUT_COMPILED).values())


def test_the_rows_are_of_the_pinned_transformers(rows):
    assert {row["transformers"] for row in rows} == {PINNED}, "make conformance anew: delete its rows"


@pytest.mark.skipif(transformers.__version__ != PINNED, reason="another transformers registers other classes")
def test_every_class_that_is_registered_has_a_row(rows):
    found = [(row["kind"], row["class"]) for row in rows]
    assert sorted(found) == sorted(classes()), "make conformance; a class that is gone: delete its row"


def test_inductor_is_right_where_it_was_tried(compiled):
    tried = {row["class"]: row["verdict"] for row in compiled if row["backend"] == "inductor"}
    assert set(tried) <= set(COMPILED) and set(tried.values()) <= {"right"} and len(tried) >= INDUCTOR
    assert not any(row["wrong"] for row in compiled)


def test_the_page_says_what_the_table_says(rows, compiled):
    text = PAGE.read_text(encoding="utf-8")
    assert page(text, rows, compiled) == text, "docs/families.md is out of date: python -m bench.conformance.page writes it anew"


def test_nothing_is_wrong_and_what_is_right_only_grows(rows):
    assert [row["class"] for row in rows if row["verdict"] == "wrong" or row["wrong"]] == []
    said = counts(rows)
    assert all(said[kind]["right"] >= least for kind, least in FLOOR.items())
    assert all(row["note"] for row in rows if row["verdict"] != "right")


@pytest.mark.parametrize("name", SAMPLE)
def test_a_class_is_right_in_every_mode_or_refused(name):
    row = measure(SAMPLE[name], name)
    assert row["verdict"] == "right" and not row["wrong"], row
    assert "forward" in row["right"].split("; ")
