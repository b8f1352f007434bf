"""The answers of docs/questions.md are files of the tree, and the picture of a forward is that of the code."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_answer_is_one_file():
    answers = re.findall(r"^\| \d+ \|.*\| `([^`]+)` \|$", (ROOT / "docs" / "questions.md").read_text(), re.MULTILINE)
    assert len(answers) == len(set(answers)) == 20
    assert [path for path in answers if not any((top / path).is_file() for top in (ROOT, ROOT / "fastedit"))] == []


def test_the_picture_of_a_forward_is_current(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    sys.modules.pop("tools.forward_picture", None)
    from tools import forward_picture

    assert forward_picture.PICTURE.read_text() == forward_picture.draw(), "run python -m tools.forward_picture"
    assert len(forward_picture.files()) <= 8
