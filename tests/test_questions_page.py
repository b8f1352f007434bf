"""The answers of docs/questions.md are files of the tree."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_answer_is_one_file():
    answers = re.findall(r"^\| \d+ \|.*\| `([^`]+)` \|$", (ROOT / "docs" / "questions.md").read_text(), re.MULTILINE)
    assert len(answers) == len(set(answers)) == 20
    assert [path for path in answers if not any((top / path).is_file() for top in (ROOT, ROOT / "fastedit"))] == []
