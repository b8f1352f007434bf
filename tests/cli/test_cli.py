"""The command line: what it prints, writes and refuses."""

import json
import random
import re
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer
from typer.testing import CliRunner

import fastedit as fe
from fastedit.cli import app, doctor
from fastedit.cli.train_sentences import _split, read_rows
from fastedit.recipes import SentenceClassifier, accuracy, load_head, predict

WORDS = ["the", "film", "was", "very", "quite", "good", "bad", "and", "long", "short"]


def invoke(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result.output


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny encoder with a tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("encoder")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        vocab_size=5 + len(WORDS), max_position_embeddings=32, initializer_range=0.3,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def reviews(count=200):
    """Positive where "good" is in it."""
    generator = random.Random(0)
    filler = [word for word in WORDS if word not in ("good", "bad")]
    rows = []
    for _ in range(count):
        verdict = generator.choice(["good", "bad"])
        words = [*generator.choices(filler, k=5), verdict]
        generator.shuffle(words)
        rows.append((" ".join(words), "positive" if verdict == "good" else "negative"))
    return rows


def tsv(path, rows, columns=("text", "label")):
    path.write_text("\n".join("\t".join(row) for row in [columns, *rows]) + "\n")
    return path


# --- help and imports ---------------------------------------------------------------------------------------


def test_every_command_has_help_with_an_example():
    listed = invoke("--help")
    for command in ("demo", "doctor", "show", "train", "predict", "contrast", "generate", "serve"):
        assert command in listed
        text = invoke(command, "--help")
        assert re.search(r"Examples?[:,]", text) and f"fastedit {command}" in text


def test_the_command_line_starts_without_torch():
    code = "import sys, fastedit.cli; assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- train and show -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    data = tsv(folder / "reviews.tsv", reviews(400))
    output = invoke(
        "train", encoder, data, "--out", folder / "edit", "--epochs", 10, "--batch-size", 16, "--lr", 0.03
    )
    return folder / "edit", output


def test_train_learns_and_saves_what_it_learned(trained, encoder):
    folder, output = trained
    note = json.loads((folder / "edit.json").read_text())["training"]
    assert note["labels"] == ["negative", "positive"] and note["rows"] == 360 and note["held_out"] == 40
    assert note["accuracy"] >= 0.9 and f"{100 * note['accuracy']:.1f} %" in output
    assert "64 parameters and a head of 34" in output

    model = SentenceClassifier(AutoModel.from_pretrained(encoder), 2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    _, held_out = _split(folder.parent / "reviews.tsv", None, (None, "label"), None, 0)
    texts, labels = zip(*held_out, strict=True)
    labels = [note["labels"].index(label) for label in labels]
    untrained = accuracy(predict(model, texts, tokenizer), labels)
    handle = fe.load(model, folder)
    load_head(model, folder)
    assert handle.num_parameters() == 64
    assert accuracy(predict(model, texts, tokenizer), labels) == note["accuracy"] > untrained + 0.2


def test_show_prints_the_edit(trained):
    folder, _ = trained
    output = invoke("show", folder)
    assert "64 parameters" in output and "RED on mlp" in output and "bert, 2 layers, width 16" in output
    scale = fe.store.read(folder)[1]["0.layers.1.mlp.scale"]
    assert f"{(scale - 1).abs().mean():.4f} ({(scale - 1).abs().max():.4f})" in output
    assert "training lr: 0.03" in output
    told = json.loads(invoke("show", folder, "--json"))
    assert told["edits"][0]["kind"] == "RED" and told["shapes"]["0.layers.1.mlp.scale"] == [16]


def test_show_of_nothing_is_exit_code_2(tmp_path):
    result = CliRunner().invoke(app, ["show", str(tmp_path)])
    assert result.exit_code == 2 and "has no edit.json" in re.sub(r"[│\s]+", " ", result.output)
    assert not isinstance(result.exception, fe.EditFileError)


def test_show_of_an_edit_that_makes_no_sense_says_why(trained, tmp_path):
    folder, _ = trained
    header, tensors = fe.store.read(folder)
    for key in ("format", "version", "tensors"):
        del header[key]
    header |= {"base": [1], "training": "long"}
    fe.store.write(tmp_path, header, tensors)
    assert "base: unnamed" in invoke("show", tmp_path)
    header["edits"][0]["strength"] = "much"
    fe.store.write(tmp_path, header, tensors)
    assert "strength is 'much'" in invoke("show", tmp_path, code=2)


@pytest.mark.parametrize("method", ["direft", "noreft", "loreft"])
def test_other_methods_train(encoder, tmp_path, method):
    data = tsv(tmp_path / "reviews.tsv", reviews(40))
    invoke("train", encoder, data, "--out", tmp_path / "edit", "--method", method, "--rank", 2, "--epochs", 1)
    header, tensors = fe.store.read(tmp_path / "edit")
    assert header["edits"][0]["rank"] == 2 and header["edits"][0]["kind"].lower() == method
    assert all(t.shape[0] == 2 for t in tensors.values())


def test_train_on_jsonl_with_its_own_columns_and_held_out_file(encoder, tmp_path):
    rows = reviews(40)
    data = tmp_path / "reviews.jsonl"
    data.write_text(
        "".join(json.dumps({"review": t, "stars": 5 if kind == "positive" else 1}) + "\n" for t, kind in rows)
    )
    held_out = tsv(tmp_path / "held.tsv", [(t, "5") for t, _ in rows[:7]], ("review", "stars"))
    invoke(
        "train", encoder, data, "--out", tmp_path / "edit", "--text", "review", "--label", "stars",
        "--eval", held_out, "--epochs", 1, "--rows", 30,
    )  # fmt: skip
    note = json.loads((tmp_path / "edit" / "edit.json").read_text())["training"]
    assert note["labels"] == ["1", "5"] and note["rows"] == 30 and note["held_out"] == 7


def test_mistakes_in_the_data_are_one_line(encoder, tmp_path):
    good = reviews(10)
    cases = {
        "a.xml": ("text,label\n", "is none of .jsonl, .json"),
        "empty.tsv": ("text\tlabel\n", "has no rows"),
        "columns.tsv": ("body\tlabel\na\t1\n", "has no 'text'"),
        "short.tsv": ("text\tlabel\nfine\t1\nbroken\n", "row 2 of"),
        "bad.jsonl": ('{"text": "a", "label": 1}\n{"text": \n', "line 2 of"),
        "list.jsonl": ("[1]\n", "expected an object with columns"),
        "one.tsv": ("text\tlabel\n" + "".join(f"{t}\tsame\n" for t, _ in good), "one label only"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_text(content)
        output = invoke("train", encoder, tmp_path / name, "--out", tmp_path / "edit", code=2)
        assert message in re.sub(r"[\s│]+", " ", output), (name, output)
    output = invoke("train", encoder, tmp_path / "nowhere.tsv", code=2)
    assert "No such file" in output
    output = invoke("train", encoder, tsv(tmp_path / "r.tsv", good), "--method", "lora", code=2)
    assert "expected one of red, red+, loreft" in output
    assert not (tmp_path / "edit").exists()


def test_quotes_and_tabs_in_texts_are_kept(tmp_path):
    (tmp_path / "a.tsv").write_text('sentence\tlabel\n"it\'s "fine" \t1\n')
    assert read_rows(tmp_path / "a.tsv", None, "label") == [('"it\'s "fine" ', "1")]


# --- doctor -------------------------------------------------------------------------------------------------


def test_doctor_says_what_runs_here():
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert torch.__version__ in result.output and fe.__version__ in result.output
    from fastedit.ops import native

    built = native._native
    assert ("using " + built.instruction_set() if built else "not built") in result.output
    cxx, cuda = doctor.cxx_compiler(), doctor.cuda_compiler()
    wrong = (cxx and not built) or (cxx and cuda and not built.CUDA_ARCHITECTURES)
    assert result.exit_code == bool(wrong)


@pytest.mark.parametrize(
    ("native", "architectures", "cxx", "cuda", "environment", "expected"),
    [
        (True, "80 90", "g++", "nvcc", {}, None),
        (True, "", "g++", None, {}, None),
        (False, "", None, None, {}, None),
        (False, "", None, "nvcc", {}, None),
        (False, "", "g++", None, {}, "g++ is here, but the native module is not"),
        (False, "", "g++", "nvcc", {}, "g++ is here, but the native module is not"),
        (True, "", "g++", "nvcc", {}, "nvcc is here, but the native module has no CUDA kernels"),
        (True, "", "g++", "nvcc", {"FASTEDIT_CUDA": "OFF"}, None),
        (False, "", "g++", "nvcc", {"FASTEDIT_NATIVE": "OFF"}, None),
    ],
)
def test_doctor_fails_where_a_compiler_is_here_and_its_kernels_are_not(
    native, architectures, cxx, cuda, environment, expected
):
    found = doctor.problems(native, architectures, cxx, cuda, environment)
    assert found == [] if expected is None else len(found) == 1 and found[0].startswith(expected)


def test_doctor_exit_code_and_hints(monkeypatch):
    monkeypatch.setattr(doctor, "_native", lambda: (None, "no module named _native"))
    monkeypatch.setattr(doctor, "cuda_compiler", lambda: None)
    monkeypatch.setattr(doctor, "cxx_compiler", lambda: "/usr/bin/g++")
    assert "native module is not: the build failed" in re.sub(r"\s+", " ", invoke("doctor", code=1))
    monkeypatch.setattr(doctor, "cxx_compiler", lambda: None)
    output = invoke("doctor")
    assert "no C++ compiler: pure Python serves" in output and "no CUDA compiler: Triton serves" in output


def test_show_prints_no_terminal_escapes(trained, tmp_path):
    """A title of the window, a colour, a reversed reading order: written out, not obeyed."""
    from fastedit.files import edit_file

    folder, _ = trained
    header, tensors = edit_file.read(folder)
    header = {key: header[key] for key in ("fastedit", "edits", "strength", "base")}
    header["base"] |= {"model": "a\x1b]0;owned\x07b"}
    edit_file.write(tmp_path, header | {"training": {"n\x1b[31m": "\u202eevil"}}, tensors)
    output = invoke("show", str(tmp_path))
    assert "\x1b]" not in output and "\x1b[31m" not in output and "\u202e" not in output and "\x07" not in output
    assert "\\x1b]0;owned\\x07" in output and "\\u202eevil" in output


def test_show_reseals_what_a_hand_changed(trained, tmp_path):
    folder, _ = trained
    shutil.copytree(folder, tmp_path / "edit")
    path = tmp_path / "edit" / "edit.json"
    path.write_text(path.read_text().replace('"strength": 1.0,\n  "base"', '"strength": 0.5,\n  "base"'))
    assert "show --reseal" in " ".join(invoke("show", tmp_path / "edit", code=2).split())
    assert "strength: 0.5" in invoke("show", "--reseal", tmp_path / "edit")
    assert "strength: 0.5" in invoke("show", tmp_path / "edit")


def test_every_command_that_loads_a_model_says_where_and_how():
    import typer

    where = {"--device", "--dtype", "--device-map"}
    without = {
        "demo", "doctor", "show", "convert", "ubpl", "push",  # no model, or one that is given
        "serve",  # vLLM's own options
    }  # fmt: skip
    commands = typer.main.get_command(app).commands
    assert without < set(commands)
    for name, command in commands.items():
        has = {option for parameter in command.params for option in parameter.opts}
        assert name in without or where <= has, f"{name} lacks {where - has}"
        assert name in without | {"merge"} or "--quantize" in has, name  # a quantized weight cannot take an edit
