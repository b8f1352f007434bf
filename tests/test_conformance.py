"""The conformance suite: its committed table, and a few of its classes run anew. All of them: make conformance."""

import pytest

from bench.conformance import measure
from bench.conformance.__main__ import OUT, rows_of
from bench.conformance.page import PAGE, counts, page

FLOOR = {"causal": 19}  # classes that are right at `block`: may only grow
SAMPLE = {
    "Qwen3_5ForCausalLM": "causal", "JambaForCausalLM": "causal", "XLNetLMHeadModel": "causal", "AlbertForMaskedLM": "encoder",
    "BartForConditionalGeneration": "seq2seq", "ViTForImageClassification": "vision",
}  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    return list(rows_of(OUT).values())


def test_the_page_says_what_the_table_says(rows):
    text = PAGE.read_text(encoding="utf-8")
    assert page(text, rows) == text, "docs/families.md is out of date: python -m bench.conformance.page writes it anew"


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
