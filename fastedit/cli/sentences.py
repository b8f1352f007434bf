"""The demo's task: tell sentences whose words are in order from those with two neighbors swapped.

Bigram shift (Conneau et al. 2018, arXiv 1805.01070), on the prose of Python's own standard library.

The rules, all of which decide the figures:
    source     docstrings (module, class, function), parsed and not imported, of the modules in MODULES: those
               that CPython 3.11, 3.12 and 3.13 all ship. Wording differs a little between versions.
    sentence   a docstring is cut at blank lines and a paragraph at [.!?] before a capital. Kept are sentences of 7 to
               25 words, with a capital first letter and a final full stop (then dropped), whose words are letters,
               ' and - alone, or that with a comma after it
    swap       every second sentence (by hash) has words i and i + 1 exchanged. i is drawn by hash among the
               pairs that differ, have no comma, and are neither first nor last: no mark gives it away
    no copies  one sentence per bag of words: neither it nor any swap of it is elsewhere, in either split
    order      by SHA-256 of the sentence, so the same sentence is in the same split on every machine
"""

import ast
import hashlib
import re
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path

MODULES = [
    "abc", "argparse", "ast", "asyncio", "base64", "bdb", "bisect", "bz2", "calendar", "cmd", "code",
    "codecs", "codeop", "collections", "colorsys", "compileall", "concurrent", "configparser", "contextlib",
    "copy", "copyreg", "csv", "ctypes", "curses", "dataclasses", "dbm", "difflib", "dis", "doctest",
    "email", "enum", "filecmp", "fileinput", "fnmatch", "fractions", "ftplib", "functools", "genericpath",
    "getopt", "getpass", "gettext", "glob", "graphlib", "gzip", "hashlib", "heapq", "hmac", "html", "http",
    "imaplib", "importlib", "inspect", "ipaddress", "json", "keyword", "linecache", "locale", "logging",
    "lzma", "mailbox", "mimetypes", "modulefinder", "multiprocessing", "netrc", "ntpath", "numbers",
    "operator", "optparse", "os", "pdb", "pickle", "pickletools", "pkgutil", "platform", "plistlib",
    "poplib", "posixpath", "pprint", "profile", "pstats", "pty", "py_compile", "pyclbr", "pydoc", "queue",
    "quopri", "random", "re", "reprlib", "rlcompleter", "runpy", "sched", "secrets", "selectors", "shelve",
    "shlex", "shutil", "signal", "site", "smtplib", "socket", "socketserver", "sqlite3", "ssl", "stat",
    "statistics", "string", "stringprep", "struct", "subprocess", "symtable", "tabnanny", "tarfile",
    "tempfile", "textwrap", "threading", "timeit", "tkinter", "token", "tokenize", "tomllib", "trace",
    "traceback", "tracemalloc", "tty", "turtle", "types", "typing", "unittest", "urllib", "uuid", "venv",
    "warnings", "wave", "weakref", "webbrowser", "wsgiref", "xml", "xmlrpc", "zipapp", "zipimport",
    "zoneinfo", "_collections_abc", "_compat_pickle", "_markupbase", "_osx_support", "_py_abc",
    "_pydecimal", "_pyio", "_strptime", "_threading_local", "_weakrefset",
]  # fmt: skip

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*,?")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Example:
    """One sentence as the model sees it: label 1 if two words were swapped. `original` is in order."""

    text: str
    label: int
    original: str


def examples(count=None):
    """The task's examples, in hash order. At most `count` of them."""
    found = {}
    for sentence in sentences():
        bag = tuple(sorted(sentence.lower().replace(",", "").split()))
        found[bag] = min(sentence, found.get(bag, sentence))
    ordered = sorted(found.values(), key=_digest)
    made = [example for sentence in ordered if (example := _example(sentence)) is not None]
    return made[:count]


def sentences():
    """Every sentence by the rules above, repeats included."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        file
        for module in MODULES
        for file in (root / f"{module}.py", *(root / module).rglob("*.py"))
        if file.is_file() and not {"test", "tests", "__pycache__"} & set(file.relative_to(root).parts)
    )
    if not files:
        raise FileNotFoundError(
            f"no standard library sources under {root}: the demo reads its sentences there"
        )
    for file in files:
        for docstring in _docstrings(file):
            for paragraph in re.split(r"\n\s*\n", docstring):
                for sentence in _SENTENCE_END.split(" ".join(paragraph.split())):
                    words = sentence[:-1].split(" ")
                    if _is_sentence(sentence, words):
                        yield " ".join(words)


def _docstrings(file):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in somebody's docstring
        tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and (docstring := ast.get_docstring(node)):
            yield docstring


def _is_sentence(sentence, words):
    return (
        sentence.endswith(".")
        and 7 <= len(words) <= 25
        and words[0][:1].isupper()
        and all(_WORD.fullmatch(word) for word in words)
    )


def _digest(text):
    return hashlib.sha256(text.encode()).digest()


def _example(sentence):
    """None if no pair can be swapped."""
    words = sentence.split()
    pairs = [
        i
        for i in range(1, len(words) - 2)
        if "," not in words[i] + words[i + 1] and words[i].lower() != words[i + 1].lower()
    ]
    if not pairs:
        return None
    digest = _digest("swap " + sentence)
    if digest[0] % 2 == 0:
        return Example(sentence, 0, sentence)
    at = pairs[int.from_bytes(digest[1:5], "big") % len(pairs)]
    words[at], words[at + 1] = words[at + 1], words[at]
    return Example(" ".join(words), 1, sentence)
