"""The code blocks of the documentation, as they stand on the pages."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>(?:\{?[\w-]+\}?[^\n]*)?)\n(?P<code>.*?)^(?P=indent)```", re.S | re.M)
_COMMAND = re.compile(r"^ {4}(fastedit (?:[^\n]*\\\n)*[^\n]*)", re.M)


class Block(NamedTuple):
    page: str
    line: int
    language: str
    code: str

    def __str__(self):
        return f"{self.page}:{self.line}"


def pages():
    """README.md and the pages of docs/, as names below docs/."""
    docs = ROOT / "docs"
    return ["../README.md", *sorted(str(p.relative_to(docs)) for p in docs.rglob("*.md") if "_build" not in p.parts)]


def blocks(page, language="python"):
    """The fenced blocks of a language on a page, in order. The line is that of the fence."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        if match["language"].partition(" ")[0].strip("{}") == language:
            found.append(Block(page, text.count("\n", 0, match.start()) + 1, match["language"], match["code"]))
    return found


def commands(page):
    """The lines of a page that call fastedit, indented or in a fence, continued ones whole."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = _COMMAND.findall(text)
    for match in _FENCE.finditer(text):
        if match["language"] in ("", "sh", "bash", "console"):
            found += re.findall(r"^(fastedit (?:[^\n]*\\\n)*[^\n]*)", match["code"], re.M)
    return found
