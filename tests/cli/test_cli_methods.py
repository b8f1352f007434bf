"""`fastedit roleref | inferaligner | cast | ubpl` on a tiny chat model: from files of prompts to an edit that generates."""

import json

import pytest
import tiny_models
import torch
from test_cli import invoke
from test_cli_steering import refused
from word_tokenizer import WORDS, tokenizer

import fastedit as fe
from fastedit.cli.loading import load_model
from fastedit.methods import roleref, ubpl

GOOD = ["the cat sat", "a dog ran", "it is good", "so very good", "the dog is good", "a cat was big", "i think so", "yes it is"]
BAD = ["the mat sat", "a mat ran", "it is bad", "so very bad", "the dog is bad", "a cat was small", "i think no", "no it was"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models, `model` and `aligned`, and two files of prompts."""
    folder = tmp_path_factory.mktemp("methods")
    said = tokenizer()
    for name in ("model", "aligned"):
        made = tiny_models.build("llama", vocab_size=len(said), num_hidden_layers=4, max_position_embeddings=128)
        if name == "aligned":
            with torch.no_grad():
                made.model.layers[1].mlp.down_proj.weight.mul_(1.5)
        made.save_pretrained(folder / name)
        said.save_pretrained(folder / name)
    (folder / "good.txt").write_text("\n".join(GOOD))
    (folder / "bad.txt").write_text("\n".join(BAD))
    return folder


def generated(folder, out, *more):
    return invoke("generate", folder / "model", "--edit", out, "--prompt", "the cat", "--max-new-tokens", 3, *more)


def test_roleref(folder, tmp_path):
    (tmp_path / "phrases.txt").write_text("no\nzebra\n")
    files = ["--answerable", folder / "good.txt", "--conflicting", folder / "bad.txt", "--role", "a big cat ."]
    said = invoke("roleref", folder / "model", *files, "--refusals", tmp_path / "phrases.txt", "--max-new-tokens", 2,
                  "--out", tmp_path / "role", "--layers", "1-2")  # fmt: skip
    assert "refused, conflicting" in said and "2 held-out pairs" in said
    found = fe.Directions.load(tmp_path / "role")
    loaded, words = load_model(folder / "model")
    expected = roleref.vectors(loaded, words, *(roleref.in_role("a big cat .", some[2:]) for some in (GOOD, BAD)))
    for layer, vector in expected.items():
        torch.testing.assert_close(found[layer], vector, rtol=0, atol=1e-5)
    note = json.loads((tmp_path / "role" / "edit.json").read_text())
    assert note["edits"][0]["layers"] == [1, 2] and note["training"]["pairs"] == 6
    generated(folder, tmp_path / "role", "--strength", 1)


def test_inferaligner(folder, tmp_path):
    files = ["--harmful", folder / "bad.txt", "--harmless", folder / "good.txt", "--out", tmp_path / "a", "--at-least", 0.5]
    said = invoke("inferaligner", folder / "model", folder / "aligned", *files)
    assert "of the held-out prompts" in said and "saved" in said
    fe.Directions.load(tmp_path / "a").save(tmp_path / "guide")
    again = invoke("inferaligner", folder / "model", tmp_path / "guide", *files[:4], "--out", tmp_path / "b", "--layers", "2")
    assert "layers [2]" in again and fe.Directions.load(tmp_path / "b") == fe.Directions.load(tmp_path / "a")
    generated(folder, tmp_path / "a")
    said = refused("inferaligner", folder / "model", folder / "aligned", *files[:4], "--out", tmp_path / "c", "--at-least", "1.1")
    assert "no layer's gate is right on 1.1" in said and not (tmp_path / "c").exists()


def test_cast(folder, tmp_path):
    files = ["--opens", folder / "good.txt", "--closed", folder / "bad.txt"]
    fe.Directions({3: torch.ones(32), 1: torch.ones(32)}).save(tmp_path / "along")
    said = invoke("cast", folder / "model", *files, "--behaviour", tmp_path / "along", "--chat", "--out", tmp_path / "out")
    assert "condition: layer" in said and "held-out prompts" in said
    note = json.loads((tmp_path / "out" / "edit.json").read_text())
    assert note["training"]["method"] == "cast" and note["training"]["condition"] <= min(note["edits"][0]["layers"])
    generated(folder, tmp_path / "out", "--chat")
    refusal = refused("cast", folder / "model", *files, "--behaviour", tmp_path, "--out", tmp_path / "x")
    assert "has no directions.safetensors" in refusal


def test_ubpl(folder, tmp_path):
    out = tmp_path / "lexicons.json"
    rows = [("glad", "the glad glad dog ran glad\n" * 5), ("grey", "the grey grey dog ran grey\n" * 5)]
    for name, text in rows:
        (tmp_path / f"{name}.txt").write_text(text)
    for one, other in (("glad", "grey"), ("grey", "glad")):
        files = ["--texts", tmp_path / f"{one}.txt", "--background", tmp_path / f"{other}.txt"]
        assert f"1 words of '{one}'" in invoke("ubpl", *files, "--trait", one, "--out", out)
    assert ubpl.read_lexicons(out) == {"glad": {"glad": 1.0}, "grey": {"grey": 1.0}}
    out.write_text(json.dumps({"red": {"red": 1.0}}))
    ask = ["generate", folder / "model", "--prompt", "the cat", "--max-new-tokens", 3, "--lexicons", out]
    assert "red red red" in invoke(*ask, "--trait", "red=1000")
    assert "no trait 'blue'" in refused(*ask, "--trait", "blue=2") and "such as happy=2" in refused(*ask, "--trait", "red")
    assert "go together" in refused(*ask)
    same = ["--texts", tmp_path / "glad.txt", "--background", tmp_path / "glad.txt"]
    assert "stands out" in refused("ubpl", *same, "--trait", "x")


def test_words_that_stand_out():
    found = ubpl.build(["Joy, joy and a warm day!", "joy is a day"] * 18, ["grief and a cold day", "a day"] * 18)
    assert next(iter(found)) == "joy" and found["joy"] == 1.0 and "warm" in found
    assert not {"a", "day", "and", "grief"} & set(found)
    assert all(0 < strength <= 1 for strength in found.values()) and len(ubpl.build(["x y"] * 99, ["z"] * 99, count=1)) == 1
    assert set(WORDS) >= {"red", "no"}
