"""UBPL: the logits of a lexicon's first tokens, and nothing else."""

import json

import pytest
import tiny_models as tiny
import torch

from fastedit.methods.ubpl import UBPL, read_lexicons

WORDS = ["the", "kind", "Kind", "cruel", "kindle", "Cruel"]


class Tokenizer:
    """Whole words, with and without a space; what it does not know is two tokens that start with 'kind'."""

    def __init__(self):
        self.all_special_ids = (1,)

    def __call__(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return {"input_ids": [VOCABULARY[text]] if text in VOCABULARY else [3, VOCABULARY["kind"]]}

    def decode(self, ids):
        return {3: " "}.get(ids[0], "word")


VOCABULARY = {w: 10 + n for n, w in enumerate([*WORDS, *(" " + w for w in WORDS)])}
LEXICONS = {"warm": {"kind": 1.0, "kindness": 0.5}, "cold": {"cruel": 2.0}}


def test_only_the_words_first_tokens_are_raised():
    processor = UBPL(Tokenizer(), LEXICONS, {"warm": 3.0, "cold": -1.0})
    scores = torch.randn(2, 30)
    before = scores.clone()
    said = processor(None, scores)
    expected = torch.zeros(30)
    for word in ("kind", "Kind", " kind", " Kind"):
        expected[VOCABULARY[word]] = 3.0
    for word in ("cruel", "Cruel", " cruel", " Cruel"):
        expected[VOCABULARY[word]] = -2.0
    torch.testing.assert_close(said - before, expected.expand(2, -1), atol=1e-6, rtol=0)
    assert torch.equal(scores, before) and torch.equal(said[:, expected == 0], before[:, expected == 0])
    processor.set({"cold": 1.0})
    assert processor(None, before)[0, VOCABULARY["cruel"]] == before[0, VOCABULARY["cruel"]] + 2.0


def test_a_word_pushed_hard_is_what_is_generated():
    model = tiny.build("gpt2")
    ids = torch.tensor([[4, 5, 6]])
    processor = UBPL(Tokenizer(), {"warm": {"kind": 1.0}}, {"warm": 1e4})
    said = model.generate(ids, max_new_tokens=4, do_sample=False, logits_processor=[processor], pad_token_id=0)
    assert {int(t) for t in said[0, 3:]} <= {VOCABULARY[w] for w in ("kind", "Kind", " kind", " Kind")}


def test_files(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(LEXICONS))
    (tmp_path / "a.tsv").write_text("# traits\nwarm\tkind\t1\nwarm\tkindness\t0.5\n\ncold\tcruel\t2\n")
    assert read_lexicons(tmp_path / "a.json") == read_lexicons(tmp_path / "a.tsv") == LEXICONS
    wrong = {"warm\tkind\n": "line 1", "warm\tkind\tvery\n": "a number", "warm\tkind\tnan\n": "finite", "": "no words"}
    for text, says in wrong.items():
        (tmp_path / "b.tsv").write_text(text)
        with pytest.raises(ValueError, match=says):
            read_lexicons(tmp_path / "b.tsv")
    wrong = {"[1]": r"expected \{trait", '{"warm": {"kind": []}}': "a number", "[" * 9999: "not valid JSON"}
    for text, says in (wrong | {'{"warm": {"kind": 1' + 400 * "0" + "}}": "a number"}).items():
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(ValueError, match=says):
            read_lexicons(tmp_path / "c.json")


def test_wrong_traits():
    with pytest.raises(ValueError, match="no trait 'mild'; the lexicons have cold, warm"):
        UBPL(Tokenizer(), LEXICONS, {"mild": 1.0})
    with pytest.raises(ValueError, match="finite numbers"):
        UBPL(Tokenizer(), LEXICONS, {"warm": float("inf")})
    with pytest.raises(ValueError, match="token 21, the model 15"):
        UBPL(Tokenizer(), LEXICONS, {"warm": 1.0, "cold": 1.0})(None, torch.zeros(1, 15))
