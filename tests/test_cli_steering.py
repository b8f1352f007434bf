"""`fastedit contrast` and `fastedit generate`, on trained models."""

import json
import subprocess
import sys

import pytest
import typer
from test_cli import invoke
from typer.testing import CliRunner

import fastedit as fe
from fastedit.cli import app, texts


def refused(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "1000"})
    assert result.exit_code == 2, result.output
    return result.output


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """Sentences on a dog and the same ones on a cake."""
    folder = tmp_path_factory.mktemp("lines")
    frames = ("The girl saw a {}.", "Tom had a big {}.", "It was a {}.", "Mom looked at the {}.", "He liked the {}.")
    for name, word in (("dog", "dog"), ("cake", "cake")):
        (folder / f"{name}.txt").write_text("\n".join(frame.format(word) for frame in frames) + "\n")
    return folder


@pytest.mark.parametrize("name", ["stories260K", "babyllama-char105"])
def test_from_two_files_to_steered_text(shared, lines, tmp_path, name):
    model, out = shared / "models" / name, tmp_path / "dog"
    extra = ["--method", "probe", "--gguf", tmp_path / "dog.gguf"] if name == "stories260K" else ["--method", "pca"]
    output = invoke(
        "contrast", model, "--positive", lines / "dog.txt", "--negative", lines / "cake.txt", "--out", out,
        "--layers", "0,2-3", "--at", "mean", *extra,
    )  # fmt: skip
    assert f"saved {out}" in output and "5 positive and 5 negative" in output
    directions = fe.Directions.load(out)
    assert directions.layers == (0, 2, 3)
    note = json.loads((out / "edit.json").read_text())
    assert note["edits"][0]["kind"] == "Steer" and note["edits"][0]["layers"] == [0, 2, 3]
    assert (out / "directions.png").read_bytes()[:4] == b"\x89PNG"
    if name == "stories260K":
        assert "held-out accuracy" in output
        vector = fe.Directions.load_gguf(tmp_path / "dog.gguf")
        assert vector == directions.at(2, 3) and vector.about["type"] == "llama"
    ask = ["generate", model, "--prompt", "Once upon a time", "--max-new-tokens", 6]
    plain = invoke(*ask)
    steered = invoke(*ask, "--edit", out, "--strength", 0, "--strength", 20)
    zero, _, twenty = steered.partition("strength 20")
    assert "strength 0" in zero and plain.strip() in zero and plain.strip() not in twenty
    assert plain.startswith("Once upon a time") and "Once upon a time" in twenty


def test_on_a_model_of_letters(shared, tmp_path):
    model = shared / "models" / "gpt-nano-sort"
    (tmp_path / "a.json").write_text(json.dumps(["AABAAC", "BAAAAA", "CABAAA"]))
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in ("CCBCCA", "ACCCBC", "CCCCAB")))
    output = invoke("contrast", model, "--positive", tmp_path / "a.json", "--negative", tmp_path / "c.jsonl",
                    "--out", tmp_path / "out")  # fmt: skip
    assert "3 positive and 3 negative" in output
    sorted_ = invoke("generate", model, "--prompt", "CBABCA", "--temperature", 0, "--max-new-tokens", 5)
    assert sorted_.strip().replace(" ", "") == "CBABCAAABBC"[: len("CBABCA") + 5]


def test_refusals(shared, lines, tmp_path):
    model, out = shared / "models" / "stories260K", tmp_path / "out"
    files = ["--positive", lines / "dog.txt", "--negative", lines / "cake.txt"]
    assert "method is 'median'" in refused("contrast", model, *files, "--out", out, "--method", "median")
    assert "could not be read" in refused("contrast", model, "--positive", "none.txt", "--negative", "n", "--out", out)
    assert "could not be loaded" in refused("contrast", tmp_path, *files, "--out", out)
    assert "no layer 9" in refused("contrast", model, *files, "--out", out, "--layers", "9")
    assert not out.exists()
    assert "no prompt" in refused("generate", model)
    assert "has no edit.json" in refused("generate", model, "--prompt", "a", "--edit", tmp_path)
    assert "--edit" in refused("generate", model, "--strength", "2", "--prompt", "Once")


def test_layer_numbers():
    assert texts.layer_numbers(None) is None
    assert texts.layer_numbers("3") == [3]
    assert texts.layer_numbers("8-10, 0,-1") == [8, 9, 10, 0, -1]
    for wrong in ("a", "3-", "", "5-4"):
        with pytest.raises(typer.BadParameter):
            texts.layer_numbers(wrong)


def test_the_commands_in_a_process_of_their_own(shared, tmp_path):
    """Nothing has imported anything before them."""
    stories = shared / "data" / "tinystories" / "tinystories_1000.json"
    stories = json.loads(stories.read_text())[:24]
    for name, some in (("positive", stories[:12]), ("negative", stories[12:])):
        (tmp_path / f"{name}.txt").write_text("\n".join(story.replace("\n", " ") for story in some))
    model, program = str(shared / "models" / "stories260K"), [sys.executable, "-c", "from fastedit.cli import app; app()"]
    sets = ["--positive", str(tmp_path / "positive.txt"), "--negative", str(tmp_path / "negative.txt"), "--max-length", "60"]
    done = subprocess.run([*program, "contrast", model, *sets, "--out", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = subprocess.run(
        [*program, "generate", model, "--edit", str(tmp_path / "out"), "--prompt", "Once", "--max-new-tokens", "4"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert said.returncode == 0 and said.stdout.count("Once") == 1, said.stderr
