"""`fastedit merge | convert | evaluate | sweep | bench | push --card`, and what the program says of mistakes."""

import json
import os
import re
import subprocess
import sys

import pytest
import tiny_models
import torch
from test_cli import encoder, invoke, reviews, trained, tsv  # noqa: F401 (encoder and trained are fixtures)
from transformers import AutoModelForCausalLM
from word_tokenizer import tokenizer

import fastedit as fe
from fastedit import cli
from fastedit.cli.loading import load_model

COMMANDS = ("merge", "convert", "evaluate", "sweep", "bench", "push")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    said = tokenizer()
    made = tiny_models.build("llama", vocab_size=len(said), max_position_embeddings=256)
    made.save_pretrained(folder)
    said.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def directions(tmp_path_factory):
    vectors = {layer: torch.randn(32, generator=torch.Generator().manual_seed(layer)) for layer in (1, 2)}
    return fe.Directions(vectors, about={"site": "block", "type": "llama"}).save(tmp_path_factory.mktemp("directions"))


def refused(*arguments):
    """The message of exit code 2, without the box around it."""
    return re.sub(r"[\s│]+", " ", invoke(*arguments, code=2))


def saved(model, edits, folder):
    loaded, _ = load_model(str(model), device="cpu")
    fe.patch(loaded, edits).save(folder)
    return folder


def scaled(site="mlp", **more):
    draws = {layer: 1 + 0.3 * torch.randn(32, generator=torch.Generator().manual_seed(layer)) for layer in range(3)}
    return fe.ScaleBias(draws, False, site=site, trainable=False, **more)


def logits(loaded):
    ids = torch.arange(4, 14)[None]
    with torch.no_grad():
        return loaded(ids).logits


def test_each_has_help_with_an_example():
    listed = invoke("--help")
    for command in COMMANDS:
        assert command in listed
        said = invoke(command, "--help")
        assert re.search(r"Examples?[:,]", said) and f"fastedit {command}" in said


def test_merge_saves_an_ordinary_model(model, program, tmp_path):
    edit = saved(model, scaled(), tmp_path / "edit")
    found = json.loads(invoke("merge", model, edit, "--out", tmp_path / "merged", "--strength", 0.5, "--json"))
    assert found["strength"] == 0.5 and found["layers_merged"] == 3
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not any("fastedit" in name for name in merged.state_dict())
    loaded, _ = load_model(str(model), device="cpu")
    plain = logits(loaded)
    handle = fe.load(loaded, edit)
    handle.strength = 0.5
    torch.testing.assert_close(logits(merged), logits(loaded), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, logits(merged), atol=1e-2)
    placed = saved(model, fe.Steer({1: torch.ones(32)}, site="mlp", positions="last 1"), tmp_path / "placed")
    assert "weights act on every token" in program("merge", model, placed, "--out", tmp_path / "no", code=2)
    assert "is not a folder" in program("verify", model, "--edit", tmp_path / "none", code=2)
    assert not (tmp_path / "no").exists()


def test_convert_there_and_back(model, directions, tmp_path):
    pytest.importorskip("gguf", reason="needs gguf")
    invoke("convert", directions, tmp_path / "a.gguf")
    made = json.loads(invoke("convert", tmp_path / "a.gguf", tmp_path / "edit", "--model", model, "--json"))
    assert made["from"] == "gguf" and made["to"] == "edit" and made["numbers"] == 64
    invoke("convert", tmp_path / "edit", tmp_path / "b.gguf")
    invoke("convert", tmp_path / "b.gguf", tmp_path / "back", "--to", "directions")
    assert fe.Directions.load(tmp_path / "back") == fe.Directions.load(directions)
    red = saved(model, scaled(), tmp_path / "red")
    assert "a Steer at 'block'" in refused("convert", red, tmp_path / "c.gguf")
    assert "is of that kind already" in refused("convert", red, tmp_path / "d")
    assert "give --model" in refused("convert", tmp_path / "a.gguf", tmp_path / "d")
    assert "expected one of edit, gguf" in refused("convert", red, tmp_path / "d", "--to", "onnx")
    assert not (tmp_path / "c.gguf").exists() and not (tmp_path / "d").exists()


def test_convert_carries_the_strengths(model, directions, tmp_path):
    pytest.importorskip("gguf", reason="needs gguf")
    loaded, _ = load_model(str(model), device="cpu")
    handle = fe.patch(loaded, fe.Steer(fe.Directions.load(directions), strength=2.0))
    handle.strength = 1.5
    handle.save(tmp_path / "edit")
    invoke("convert", tmp_path / "edit", tmp_path / "a.gguf")
    found = fe.Directions.load_gguf(tmp_path / "a.gguf")
    torch.testing.assert_close(found[1], 3.0 * fe.Directions.load(directions)[1])


def test_convert_to_peft_and_back(model, tmp_path):
    edit = saved(model, [scaled("mlp"), scaled("attn", strength=0.5)], tmp_path / "edit")
    invoke("convert", edit, tmp_path / "peft", "--to", "peft", "--model", model)
    invoke("convert", tmp_path / "peft", tmp_path / "back", "--model", model)
    said = []
    for folder in (edit, tmp_path / "back"):
        loaded, _ = load_model(str(model), device="cpu")
        fe.load(loaded, folder)
        said.append(logits(loaded))
    torch.testing.assert_close(*said, rtol=1e-5, atol=1e-5)


def test_evaluate_of_a_trained_head(encoder, trained, tmp_path):  # noqa: F811
    folder, _ = trained
    data = tmp_path / "test.csv"
    data.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in reviews(60)))
    one, two = json.loads(
        invoke("evaluate", encoder, data, "--edit", folder, "--strength", 1, "--strength", 0, "--json", "--device", "cpu")
    )
    assert one["rows"] == 60 and one["accuracy"] > two["accuracy"] + 0.2
    tsv(tmp_path / "bad.tsv", [("fine", "great")])
    assert "label 'great'" in refused("evaluate", encoder, tmp_path / "bad.tsv", "--edit", folder)


def test_evaluate_of_a_language_model(model, directions, tmp_path):
    edit = saved(model, fe.Steer(fe.Directions.load(directions)), tmp_path / "edit")
    texts = ["the cat sat on the mat .", "a very good dog ran"]
    (tmp_path / "texts.csv").write_text("sentence\n" + "\n".join(texts) + "\n")
    asked = ("--edit", edit, "--strength", 0, "--strength", 2, "--json", "--device", "cpu")
    rows = json.loads(invoke("evaluate", model, tmp_path / "texts.csv", *asked))
    loaded, said = load_model(str(model), device="cpu")

    def logps():
        found = [(torch.tensor([said(text)["input_ids"]]), text) for text in texts]
        return [(loaded(ids).logits[0, :-1].log_softmax(-1), ids[0, 1:]) for ids, _ in found]

    with torch.no_grad():
        plain = logps()
        with fe.load(loaded, edit) as handle:
            handle.strength = 2.0
            other = logps()
    count = sum(len(ids) for _, ids in plain)
    loss = [-sum(float(p.gather(-1, ids[:, None]).sum()) for p, ids in found) / count for found in (plain, other)]
    kl = sum(float((p.exp() * (p - q)).sum()) for (p, _), (q, _) in zip(plain, other, strict=True)) / count
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-6) and rows[1]["kl"] == pytest.approx(kl, rel=1e-4)
    assert rows[0]["tokens"] == rows[1]["tokens"] == count
    assert [row["loss"] for row in rows] == pytest.approx(loss, rel=1e-4)
    assert rows[1]["loss_without"] == pytest.approx(loss[0], rel=1e-4)


def test_sweep_saves_the_best(model, directions, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the cat\na dog\n")
    found = json.loads(
        invoke(
            "sweep", model, directions, "--prompts", prompts, "--measure", "word:good", "--dose", 1, "--dose", 50,
            "--layers", "1", "--layers", "1-2", "--max-new-tokens", 4, "--out", tmp_path / "best", "--json", "--device", "cpu",
        )
    )  # fmt: skip
    assert [(cell["layers"], cell["dose"]) for cell in found["cells"]] == [([1], 1.0), ([1], 50.0), ([1, 2], 1.0), ([1, 2], 50.0)]
    best = max(found["cells"], key=lambda cell: cell["mean"])
    header = json.loads((tmp_path / "best" / "edit.json").read_text())
    assert header["edits"][0]["layers"] == best["layers"] and header["edits"][0]["strength"] == best["dose"]
    assert (tmp_path / "best" / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    wrong = ("sweep", model, directions, "--prompts", prompts, "--measure", "good")
    assert "--measure is 'good', expected word:WORD" in refused(*wrong)


def test_bench_takes_turns(model):
    rows = json.loads(invoke("bench", model, "--tokens", 4, "--rounds", 3, "--json", "--device", "cpu"))
    assert [(row["work"], row["variant"]) for row in rows] == [
        (work, variant) for work in ("prefill", "decode") for variant in ("unedited", "edited", "unedited again")
    ]
    assert all(row["ms"] > 0 for row in rows) and all(row["ratio"] > 0 for row in rows if row["variant"] != "unedited")


def test_push_shows_its_card(model, tmp_path):
    card = invoke("push", saved(model, scaled(), tmp_path / "edit"), "anna/louder", "--card")
    assert 'library_name: "fastedit"' in card and "| ScaleBias | mlp | 0–2 |" in card
    assert 'fe.load(model, "anna/louder")' in card


@pytest.fixture
def program(monkeypatch, capsys):
    """What `fastedit` says as a program: one line on stderr, and an exit code."""

    def program(*arguments, code):
        monkeypatch.setattr(sys, "argv", ["fastedit", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        said = capsys.readouterr().err
        assert stopped.value.code == code and said.startswith("fastedit: ") and said.count("\n") == 1, said
        return said

    return program


def test_errors_are_one_line_with_an_exit_code(program, encoder, tmp_path):  # noqa: F811
    assert "cannot read 301 tokens" in program("bench", encoder, "--tokens", 300, code=2)
    assert "is no causal language model" in program("generate", encoder, "--prompt", "good", code=2)
    assert "No such command 'frobnicate'" in program("frobnicate", code=2)
    assert "is no saved edit" in program("convert", tmp_path, tmp_path / "a.gguf", code=2)
    assert "has no edit.json" in program("push", tmp_path, "anna/edit", code=2)
    assert "is not a folder" in program("show", tmp_path / "none", code=2)
    assert "expected user/name" in program("push", tmp_path, "anna", "--card", code=2)
    assert "there is no such folder" in program("bench", "./none", code=2)
    (tmp_path / "file").touch()
    assert "is a file" in program("merge", "./none", "edit", "--out", tmp_path / "file", code=2)
    assert "there is no folder" in program("generate", "./none", "--html", tmp_path / "none" / "a.html", code=2)


def test_a_shell_completes_commands():
    code = "import sys; sys.argv = ['fastedit']; from fastedit.cli import main; main()"
    asked = {"_FASTEDIT_COMPLETE": "complete_bash", "COMP_WORDS": "fastedit conv", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | asked)
    assert done.stdout.split() == ["convert"], done.stderr


def test_what_the_program_makes_of_what_is_raised(monkeypatch, capsys):
    def raising(error):
        def app(standalone_mode):
            raise error

        return app

    for error, code, message in (
        (ValueError("so and\nso"), 2, "so and so"), (OSError(28, "disk full"), 1, "disk full"),
        (cli.typer.BadParameter("no"), 2, "no"),
        (KeyboardInterrupt(), 130, "stopped"),
    ):  # fmt: skip
        monkeypatch.setattr(cli, "app", raising(error))
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == code and message in capsys.readouterr().err
    monkeypatch.setenv("FASTEDIT_TRACEBACK", "1")
    monkeypatch.setattr(cli, "app", raising(ValueError("so")))
    with pytest.raises(ValueError, match="so"):
        cli.main()
