"""`fastedit train --method rahf` and `--method recontrol`, on tiny models, and `generate` with what they save."""

import json

import pytest
import tiny_chat
import torch
from test_cli import invoke
from test_cli_steering import refused
from transformers import AutoModelForCausalLM

import fastedit as fe
from fastedit.cli import train_recontrol
from fastedit.methods import recontrol

PROMPTS = [f"{who} {did}" for who in ("Tom", "The girl", "A dog", "Mom") for did in ("saw a", "had a", "went to the")]
PAIRS = [
    {"prompt": "What did Tom see?", "chosen": "Tom saw a big dog.", "rejected": "Go away."},
    {"prompt": "Who is she?", "chosen": "She is a kind girl.", "rejected": "I do not care."},
    {"prompt": "Where is the cat?", "chosen": "The cat is at home.", "rejected": "Nowhere at all."},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    known = [*PROMPTS, *(text for pair in PAIRS for text in pair.values())]
    return tiny_chat.save(tmp_path_factory.mktemp("model"), 5, known, max_position_embeddings=512)


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return path


@pytest.fixture
def asked(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


def head(folder):
    return json.loads((folder / "edit.json").read_text())


QUICK = ["--samples", 2, "--max-new-tokens", 8, "--units", 32, "--epochs", 3, "--lr", 1e-3, "--lam", 0.9, "--batch-size", 8]


def test_recontrol_from_prompts_to_controlled_text(model, asked, tmp_path):
    out = tmp_path / "control"
    output = invoke(
        "train", model, asked, "--method", "recontrol", "--reward", "word:the", "--step-size", 20, "--out", out, *QUICK
    )
    assert f"saved {out}" in output and "22 responses" in output and "on 1 held-out prompts" in output
    note, edit = head(out)["training"], head(out)["edits"][0]
    assert note["reward"] == "word:the" and note["prompts"] == 11 and note["lam"] == 0.9
    assert edit["kind"] == "Control" and edit["site"] == "final" and edit["step_size"] == 20.0 and edit["units"] == [32]
    assert "Control on final" in invoke("show", out)
    ask = ["generate", model, "--prompt", "Tom had a", "--max-new-tokens", 8]
    plain, both = invoke(*ask), invoke(*ask, "--edit", out, "--strength", 0, "--strength", 50)
    zero, _, strong = both.partition("strength 50")
    assert plain.strip() in zero and plain.strip() not in strong and "Tom had a" in strong


def test_recontrol_with_a_reward_of_ones_own(model, asked, tmp_path, monkeypatch):
    (tmp_path / "my_lengths.py").write_text("def length(prompts, responses):\n    return [len(r) for r in responses]\n")
    monkeypatch.chdir(tmp_path)
    invoke("train", model, asked, "--method", "recontrol", "--reward", "my_lengths:length", "--out", "own", "--rows", 6, *QUICK)
    handle = fe.load(AutoModelForCausalLM.from_pretrained(model), tmp_path / "own")
    assert recontrol.value_net(handle).weight.shape == (32, 32) and head(tmp_path / "own")["training"]["prompts"] == 5


def test_words_are_counted_whole_and_whatever_their_case():
    count = train_recontrol.counting("dog")
    assert count(["dog"] * 3, ["Dog, dog. DOG!", "dogs hotdog", ""]) == [3.0, 0.0, 0.0]


@pytest.mark.parametrize(("mode", "student"), [("scit", "red"), ("dual", "loreft"), ("scit", "lora")])
def test_rahf_from_pairs_to_a_student(model, pairs, tmp_path, mode, student):
    out = tmp_path / "aligned"
    output = invoke(
        "train", model, pairs, "--method", "rahf", "--mode", mode, "--student", student, "--rank", 2, "--out", out,
        "--teacher-steps", 3, "--teacher-lr", 1e-3, "--steps", 15, "--lr", 1e-2, "--batch-size", 2,
    )  # fmt: skip
    output = " ".join(output.split())
    assert "distance to the target pattern on held-out pairs" in output and "on 1 held-out pair:" in output and "saved" in output
    base = AutoModelForCausalLM.from_pretrained(out / "model")
    before = AutoModelForCausalLM.from_pretrained(model)
    assert not torch.equal(base.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight)
    if student == "lora":
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(base, out)
        assert loaded.peft_config["default"].r == 2
        return
    note = head(out)["training"]
    assert note["loss_after"] < note["loss_before"] and note["mode"] == mode and note["rows"] == 2 and note["held_out"] == 1
    kinds = {"red": ("RED", 2 * 32), "loreft": ("LoReFT", 2 * 32 * 2 + 2)}
    handle = fe.load(base, out)
    kind, parameters = kinds[student]
    deepest = max(note["layers"])
    assert head(out)["edits"][0]["kind"] == kind and handle.num_parameters() == parameters * deepest
    assert "Who is" in invoke("generate", out / "model", "--edit", out, "--prompt", "Who is", "--max-new-tokens", 4)


def test_hindsight_puts_each_response_under_its_own_instruction():
    """Rows in the order good-chosen, bad-rejected against bad-chosen, good-rejected."""
    from test_rahf import Letters

    from fastedit.methods import rahf, rahf_teachers

    seen = rahf_teachers._Hindsight(rahf.Collator(Letters(), ("A", "B"), 50))(PAIRS[:2])

    def text(instruction, row, name):
        ids = Letters()
        return ids(f"{instruction}\n\n{row['prompt']}")["input_ids"] + ids(row[name], False)["input_ids"]

    for side, (good, bad) in {"own": "AB", "opposite": "BA"}.items():
        expected = [text(good, row, "chosen") for row in PAIRS[:2]] + [text(bad, row, "rejected") for row in PAIRS[:2]]
        rows = zip(seen[f"{side}_ids"], seen[f"{side}_mask"], strict=True)
        assert [ids[mask.bool()].tolist() for ids, mask in rows] == expected


def test_mistakes_are_a_line(model, pairs, asked, tmp_path):
    out = ["--out", tmp_path / "out"]
    control, rahf = ["train", model, asked, *out, "--method", "recontrol"], ["train", model, pairs, *out, "--method", "rahf"]
    assert "recontrol needs --reward" in refused(*control)
    assert "expected word:WORD or module:function" in refused(*control, "--reward", "dog")
    assert "could not be imported" in refused(*control, "--reward", "no_such_module:f")
    assert "is float, expected a function" in refused(*control, "--reward", "math:pi")
    begun = ["train", model, asked, "--out", tmp_path / "begun", "--method", "recontrol"]
    assert "expected one finite number for each" in refused(*begun, "--reward", "operator:concat", *QUICK)
    assert not (tmp_path / "begun" / "edit.json").exists()
    assert "--student is not an option of --method recontrol" in refused(*control, "--student", "red")
    assert "--reward is not an option of --method rahf" in refused(*rahf, "--reward", "word:dog")
    assert "expected scit or dual" in refused(*rahf, "--mode", "both")
    assert "--teacher-steps from 1 on" in refused(*rahf, "--mode", "dual", "--teacher-steps", 0)
    (tmp_path / "bad.jsonl").write_text(json.dumps(PAIRS[0]) + "\n" + json.dumps({"prompt": "a", "chosen": "b"}) + "\n")
    assert "row 2 of" in refused("train", model, tmp_path / "bad.jsonl", "--method", "rahf", *out)
    assert "is none of .jsonl, .json" in refused("train", model, asked, "--method", "rahf", *out)
    assert not (tmp_path / "out").exists()
