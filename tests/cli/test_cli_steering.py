"""`fastedit contrast` and `fastedit generate`, of texts and of chat messages."""

import html
import json
import subprocess
import sys

import pytest
import tiny_models
import torch
import typer
from test_cli import invoke
from typer.testing import CliRunner
from word_tokenizer import tokenizer

import fastedit as fe
from fastedit.cli import app, texts
from fastedit.cli.contrast import where_to_measure


def refused(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "1000"})
    assert result.exit_code == 2, result.output
    return result.output


FRAMES = ("The girl saw a {} .", "Tom had a big {} .", "It was a {} .", "Mom looked at the {} .", "He liked the {} .")


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """Sentences on a dog and the same ones on a cake; questions and answers about them."""
    folder = tmp_path_factory.mktemp("lines")
    for word in ("dog", "cake"):
        (folder / f"{word}.txt").write_text("\n".join(frame.format(word) for frame in FRAMES) + "\n")
        chats = [[{"role": "user", "content": "What was it ?"}, {"role": "assistant", "content": f"a {word} ."}]] * 3
        (folder / f"{word}.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    (folder / "asked.jsonl").write_text(json.dumps({"prompt": "What was it ?"}) + "\n" + json.dumps({"text": "It was"}))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny chat model with a tokenizer of these words, as a folder."""
    folder = tmp_path_factory.mktemp("model")
    more = {"dog", "cake", "What", "was", "it", "?", "Once", "upon", "time"}
    words = sorted({word for frame in FRAMES for word in frame.split()} | more)
    said = tokenizer(words)
    tiny_models.build("llama", vocab_size=len(said), num_hidden_layers=6).save_pretrained(folder)
    said.save_pretrained(folder)
    return folder


def test_from_two_files_to_steered_text(model, lines, tmp_path):
    out = tmp_path / "dog"
    output = invoke(
        "contrast", model, "--positive", lines / "dog.txt", "--negative", lines / "cake.txt", "--out", out,
        "--layers", "0,2-3", "--method", "probe", "--gguf", tmp_path / "dog.gguf",
    )  # fmt: skip
    assert f"saved {out}" in output and "5 positive and 5 negative" in output and "held-out accuracy" in output
    assert "measured at 'mean'" in output and "the plain difference" in output
    directions = fe.Directions.load(out)
    assert directions.layers == (0, 2, 3) and directions.about["at"] == "mean"
    note = json.loads((out / "edit.json").read_text())
    assert note["edits"][0]["kind"] == "Steer" and note["edits"][0]["layers"] == [0, 2, 3]
    assert (out / "directions.png").read_bytes()[:4] == b"\x89PNG"
    vector = fe.Directions.load_gguf(tmp_path / "dog.gguf")
    assert vector == directions.at(2, 3) and vector.about["type"] == "llama"
    ask = ["generate", model, "--prompt", "Once upon a", "--max-new-tokens", 6, "--temperature", 0, "--device", "cpu"]
    plain = invoke(*ask)
    steered = invoke(*ask, "--edit", out, "--strength", 0, "--strength", 200)
    zero, _, far = steered.partition("strength 200")
    assert "strength 0" in zero and plain.strip() in zero and plain.strip() not in far
    assert plain.startswith("1. Once upon a") and "1. Once upon a" in far
    by_vector = invoke(*ask, "--edit", tmp_path / "dog.gguf", "--strength", 200, "--json", "--html", tmp_path / "side.html")
    (row,) = json.loads(by_vector)
    assert (row["number"], row["strength"], row["prompt"]) == (1, 200.0, "Once upon a")
    assert f"1. Once upon a{row['reply']}" not in plain
    page = (tmp_path / "side.html").read_text()
    assert "strength 200" in page and html.escape(row["reply"]) in page and "http" not in page


def test_the_best_third_at_a_strength_found_by_its_effect(model, lines, tmp_path):
    sets = ["--positive", lines / "dog.txt", "--negative", lines / "cake.txt"]
    said = invoke("contrast", model, *sets, "--out", tmp_path / "a", "--kl", 0.01, "--prompts", lines / "asked.jsonl")
    found = fe.Directions.load(tmp_path / "a")
    assert len(found) == 2 and f"saved are layers {found.layers[0]} to {found.layers[1]}" in said
    separation = {layer: noted["separation"] for layer, noted in found.statistics.items()}
    whole = fe.contrast(*texts.load_model(model), *(texts.read_texts(path) for path in sets[1::2]), at="mean")
    assert found.layers == whole.window(2) and separation[found.layers[0]] == whole.statistics[found.layers[0]]["separation"]
    assert "strength 1 is a mean KL of 0.0" in said and "tokens of continuations" in said
    ratio = found[found.layers[0]] / whole[found.layers[0]]
    assert ratio.std() < 1e-4 * ratio.mean().abs() and abs(ratio.mean() - 1) > 1e-3
    said = invoke("contrast", model, *sets, "--out", tmp_path / "b", "--relative", 0.25)
    layer = (found := fe.Directions.load(tmp_path / "b")).layers[0]
    assert found[layer].norm().item() == pytest.approx(0.25 * found.statistics[layer]["residual"], rel=1e-5)
    assert "0.25 × the residual's norm" in said


def test_chats_are_measured_at_their_responses_and_prompts_are_user_turns(model, lines, tmp_path):
    sets = ["--positive", lines / "dog.jsonl", "--negative", lines / "cake.jsonl"]
    invoke("contrast", model, *sets, "--out", tmp_path, "--layers", "1")
    found = fe.Directions.load(tmp_path)
    assert found.about["at"] == "response"
    ids = [[1, 5, *texts.load_model(model)[1].convert_tokens_to_ids(["What", "was", "it", "?", "</s>", "<assistant>"])]]
    asked = [[{"role": "user", "content": "What was it ?"}]]
    loaded, said = texts.load_model(model)
    by_text, by_ids = fe.contrast(loaded, said, asked, ["It was"], layers=1), said("It was")["input_ids"]
    assert by_text == fe.contrast(loaded, None, ids, [by_ids], layers=1)
    said = invoke("generate", model, "--chat", "--system", "It was", "--prompt", "What was it ?", "--max-new-tokens", 3)
    assert said.startswith("1. > What was it ?") and "It was" not in said
    said = invoke("generate", model, "--prompts", lines / "asked.jsonl", "--max-new-tokens", 3, "--temperature", 0)
    assert said.startswith("1. What was it ?") and "\n2. It was" in said


def test_where_texts_are_measured_by_default():
    asked = [{"role": "user", "content": "a"}]
    answered = [*asked, {"role": "assistant", "content": "b"}]
    for given, at in ((["a"], "mean"), ([asked], "last token"), ([answered], "response"), ([{"prompt": "a"}], "response")):
        assert where_to_measure(given, None) == at
    assert where_to_measure(["a"], "so") == "suffix"


def test_refusals(model, lines, tmp_path):
    out = tmp_path / "out"
    files = ["--positive", lines / "dog.txt", "--negative", lines / "cake.txt"]
    assert "method is 'median'" in refused("contrast", model, *files, "--out", out, "--method", "median")
    assert "could not be read" in refused("contrast", model, "--positive", "none.txt", "--negative", "n", "--out", out)
    assert "could not be loaded" in refused("contrast", tmp_path, *files, "--out", out)
    assert "no layer 9" in refused("contrast", model, *files, "--out", out, "--layers", "9")
    assert "give one of them" in refused("contrast", model, *files, "--out", out, "--kl", "1", "--relative", "1")
    assert "dtype is 'int4'" in refused("contrast", model, *files, "--out", out, "--dtype", "int4")
    assert "quantize is '2bit'" in refused("contrast", model, *files, "--out", out, "--quantize", "2bit")
    assert "device is 'tpu0'" in refused("contrast", model, *files, "--out", out, "--device", "tpu0")
    if not torch.cuda.is_available():
        assert "sees no GPU" in refused("contrast", model, *files, "--out", out, "--device", "cuda")
    (tmp_path / "bad.jsonl").write_text(json.dumps({"messages": [{"role": "assistant", "content": "a"}]}))
    assert "item 1 of" in (said := refused("generate", model, "--prompts", tmp_path / "bad.jsonl")) and "roles out of" in said
    assert not out.exists()
    assert "no prompt" in refused("generate", model)
    assert "has no edit.json" in refused("generate", model, "--prompt", "a", "--edit", tmp_path)
    assert "--edit" in refused("generate", model, "--strength", "2", "--prompt", "Once")


def test_smollm2_is_the_chat_model_unless_a_folder_has_that_name(model, monkeypatch, tmp_path):
    from fastedit.interop import smollm2

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(smollm2, "chat_folder", lambda: model)
    assert "It was" in invoke("generate", "smollm2", "--prompt", "It was", "--max-new-tokens", 1)
    (tmp_path / "smollm2").mkdir()
    assert "could not be loaded" in refused("generate", "smollm2", "--prompt", "It was")


def test_layer_numbers():
    assert texts.layer_numbers(None) is None
    assert texts.layer_numbers("3") == [3]
    assert texts.layer_numbers("8-10, 0,-1") == [8, 9, 10, 0, -1]
    for wrong in ("a", "3-", "", "5-4"):
        with pytest.raises(typer.BadParameter):
            texts.layer_numbers(wrong)


def test_the_commands_in_a_process_of_their_own(model, lines, tmp_path):
    """Nothing has imported anything before them."""
    program = [sys.executable, "-c", "from fastedit.cli import app; app()"]
    sets = ["--positive", str(lines / "dog.txt"), "--negative", str(lines / "cake.txt"), "--max-length", "60"]
    done = subprocess.run(
        [*program, "contrast", str(model), *sets, "--out", str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = subprocess.run(
        [*program, "generate", str(model), "--edit", str(tmp_path / "out"), "--prompt", "Once", "--max-new-tokens", "4"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert said.returncode == 0 and said.stdout.count("Once") == 1, said.stderr


def test_layers_as_text():
    from fastedit.arguments import layers_of_text

    assert layers_of_text("8-10, 3,-1") == [8, 9, 10, 3, -1]
    for text in ("8-3,4", "", "eight", "3-"):
        with pytest.raises(ValueError, match="layers is"):
            layers_of_text(text)
