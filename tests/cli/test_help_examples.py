"""The examples of every `--help`, as pasted, in an empty folder; small models stand for smollm2 and minilm."""

import re
import shlex
import sys

import pytest
import test_commands_of_pages
import tiny_chat
import typer
from test_cli_tools import program  # noqa: F401 (a fixture)

from fastedit import cli
from fastedit.cli import loading
from fastedit.interop import smollm2

ORDER = (
    "doctor", "contrast", "show", "generate", "train", "predict", "evaluate", "merge", "convert", "sweep", "bench", "push",
    "verify", "roleref", "inferaligner", "cast", "ubpl",
)  # fmt: skip
OTHERS = {"demo", "serve", "playground"}  # test_cli_demo, serving/, test_playground
SMALLER = {
    "contrast": ["--layers", "3-6"],  # a random model's best may begin at layer 0, which llama.cpp has not
    "sweep": ["--max-new-tokens", "2"], "bench": ["--rounds", "3"], "generate": ["--max-new-tokens", "2"],
    "recontrol": ["--max-new-tokens", "4", "--units", "16", "--epochs", "2"],
    "rahf": ["--teacher-steps", "2", "--steps", "2", "--batch-size", "2"],
    "inferaligner": ["--at-least", "0"],  # a random model's gates are guesses
}  # fmt: skip


def smaller(name, given):
    """Options that make a tiny model's run short."""
    if name != "train":
        return SMALLER.get(name, [])
    method = given[given.index("--method") + 1] if "--method" in given else None
    return SMALLER.get(method, ["--epochs", "1"])


def examples(command):
    """[[argument, …]] of a command's help, but for those that name a model or a folder of the reader's own."""
    (block,) = re.findall(r"^```\n(.*?)^```", command.help, re.S | re.M)
    assert max(map(len, block.splitlines())) <= 78  # pasted from a terminal of 80 columns
    found = [shlex.split(line)[1:] for line in block.replace("\\\n", "").splitlines()]
    return [given for given in found if not any(word.startswith("./") for word in given)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    top = tmp_path_factory.mktemp("models")
    return tiny_chat.save(top / "chat", 10), test_commands_of_pages.roberta(top / "encoder")


def test_the_examples_of_help_run_as_pasted(folders, tmp_path, monkeypatch, capsys):
    chat, encoder = folders
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(smollm2, "chat_folder", lambda: chat)
    monkeypatch.setattr(loading, "encoder_folder", lambda: str(encoder))
    group = typer.main.get_command(cli.app)
    assert set(group.commands) == {*ORDER, *OTHERS}
    for name in ORDER:
        ran = examples(group.commands[name])
        assert ran, name
        for given in ran:
            monkeypatch.setattr(sys, "argv", ["fastedit", *given, *smaller(name, given)])
            capsys.readouterr()
            with pytest.raises(SystemExit) as stopped:
                cli.main()
            fine = (0, 1) if name == "doctor" else (0,)  # 1: kernels are missing here
            assert stopped.value.code in fine, (given, capsys.readouterr())
