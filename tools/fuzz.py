"""make fuzz: every reader of files on mutated ones. Findings: an exception that is not documented, a second, 100 MB.

    python -m tools.fuzz --inputs 50000 --out bench/results/fuzz.csv      each reader in a process of its own
    python -m tools.fuzz --reader edit.json --inputs 50000                  one of them
    python -m tools.fuzz --keep                                             tests/fixtures/corpus made anew of what was found

With atheris installed (`pip install atheris`), mutations follow the coverage of fastedit's own code: they start from
tests/fixtures/corpus and from what earlier runs left in build/fuzz. Without, they are random ones of the sound files, and the
table says so. Half of the inputs get the checksum that their writer would make. `make test` reads the kept corpus again.
"""

import argparse
import hashlib
import importlib.machinery
import json
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

from . import table

SECONDS, MEMORY = 1.0, 100 << 20
FIELDS = ("reader", "engine", "inputs", "loaded", "refused", "corpus", "edges", "slowest_s", "grown_mb", "findings", "wall_s")
KEPT = Path(__file__).resolve().parent.parent / "tests/fixtures/corpus"
SMALL = 2048  # bytes of an input that is kept in the repository


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", help="one of tools/readers.py; all by default")
    parser.add_argument("--inputs", type=int, default=50_000, help="for each reader")
    parser.add_argument("--corpus", type=Path, default=Path("build/fuzz"), help="kept, and gone on from")
    parser.add_argument("--keep", action="store_true", help="no mutations: few small inputs that run the same lines are kept")
    parser.add_argument("--out", type=Path, help="a CSV, one row a reader")
    asked = parser.parse_args()
    atheris, readers = (None, _readers()) if asked.keep else _instrumented()
    shared = Path("/dev/shm")
    folder = tempfile.mkdtemp(dir=shared if shared.is_dir() else None)
    try:
        made = readers(folder)
        some = {asked.reader: made[asked.reader]} if asked.reader else made
        if asked.keep:
            return keep(some, asked.corpus)
        rows = [_one(name, reader, asked, atheris) for name, reader in some.items()]
    finally:
        shutil.rmtree(folder)
    table(rows, asked.out)
    return 1 if any(row["findings"] for row in rows) else 0


def _readers():
    from .readers import readers

    return readers


def _instrumented():
    """atheris, and the readers of a fastedit that it sees; or None, and the readers."""
    try:
        import atheris
    except ImportError:
        return None, _readers()
    sys.meta_path.insert(0, _Sources())
    with atheris.instrument_imports(include=["fastedit"]):
        readers = _readers()
    if atheris._reserve_counter() < 100:
        raise SystemExit("atheris instrumented nothing of fastedit: its mutations would follow no coverage")
    return atheris, readers


def _one(name, reader, asked, atheris):
    """The row of one reader, in a fork: what libFuzzer ends, or a file ends, is that process."""
    place = _place(asked.corpus, name)
    (place / "corpus").mkdir(parents=True, exist_ok=True)
    (place / "figures.json").unlink(missing_ok=True)
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            with open(place / "log", "w") as log:
                os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
            _run(reader, name, place, asked.inputs, atheris)
        except SystemExit as ended:
            os._exit(ended.code or 0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
            os._exit(1)
        finally:
            os._exit(0)
    status = os.waitpid(pid, 0)[1]
    said = (place / "log").read_text(errors="replace")
    try:
        row = json.loads((place / "figures.json").read_text())
    except (OSError, ValueError):
        row = dict.fromkeys(FIELDS, 0) | {"reader": name}
    if status:
        row["findings"] = max(1, row["findings"])
        print(said[-4000:], file=sys.stderr)
    row["edges"] = max(map(int, re.findall(r" cov: (\d+)", said)), default=0)
    row["corpus"] = len(list((place / "corpus").iterdir()))
    if row["engine"] == "atheris" and not row["edges"]:
        row["findings"] = max(1, row["findings"])
        print("libFuzzer saw no coverage", file=sys.stderr)
    row["wall_s"] = round(time.monotonic() - start, 1)
    print(row, flush=True)
    return row


def _run(reader, name, place, inputs, atheris):
    feeder = Feeder(reader, name, place, "random" if atheris is None else "atheris", inputs)
    if atheris is None:
        for data in _mutated(reader.seeds, inputs):
            feeder(data)
        return
    for number, seed in enumerate(reader.seeds):
        for first in (b"\0", b"\xff"):
            (place / "corpus" / f"seed-{number}-{first[0]}").write_bytes(first + seed)
    words = sorted({word for seed in reader.seeds for word in re.findall(rb"[A-Za-z_][\w .]{2,30}", seed)})
    (place / "words").write_text("".join(f'"{word.decode()}"\n' for word in words))
    corpora = [str(path) for path in (place / "corpus", _place(KEPT, name)) if path.is_dir()]
    options = [f"-runs={inputs}", "-max_len=65536", "-len_control=0", "-timeout=120", "-rss_limit_mb=0"]
    options.append(f"-artifact_prefix={place}/")
    arguments = [sys.argv[0], *corpora, f"-dict={place / 'words'}", *options]
    atheris.Setup(arguments, feeder, custom_mutator=lambda *given: _rewritten(atheris.Mutate, *given))
    atheris.Fuzz()


# --- the corpus that the repository holds ---------------------------------------------------------------------------------


def kept(name):
    """The inputs of a reader in the repository."""
    place = _place(KEPT, name)
    return [path.read_bytes() for path in sorted(place.iterdir())] if place.is_dir() else []


def keep(readers, corpus):
    """Of what was found, and is small, as little as runs the same lines; into tests/fixtures/corpus."""
    for name, reader in readers.items():
        found = {path.read_bytes() for path in (_place(corpus, name) / "corpus").glob("*")} | set(kept(name))
        chosen = smallest(reader, sorted((data for data in found if len(data) <= SMALL), key=lambda data: (len(data), data)))
        place = _place(KEPT, name)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        for data in chosen:
            (place / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
        print(f"{name}: {len(chosen)} of {len(found)} inputs, {sum(map(len, chosen))} bytes", flush=True)
    return 0


def smallest(reader, inputs):
    """Those of the inputs that together run every step from line to line that any of them runs, taken greedily."""
    steps = {data: lines_of(reader, data) for data in inputs}
    left, chosen = set().union(*steps.values()), []
    while left:
        best = max(inputs, key=lambda data: (len(steps[data] & left), -len(data), data))
        chosen.append(best)
        left -= steps[best]
    return chosen


def lines_of(reader, data):
    """{(file, line before, line)} of fastedit's own code under an input."""
    steps = set()

    def called(frame, event, argument):
        file = frame.f_code.co_filename
        if "/fastedit/" not in file:
            return None
        before = 0

        def line(frame, event, argument):
            nonlocal before
            steps.add((file, before, frame.f_lineno))
            before = frame.f_lineno
            return line

        return line

    content = _content(reader, data)
    sys.settrace(called)
    try:
        reader.feed(content)
    finally:
        sys.settrace(None)
    return steps


class Feeder:
    """One reader's inputs, timed and counted; raises at a finding, with the input kept in `finding`."""

    def __init__(self, reader, name, place, engine, inputs):
        self.reader, self.place, self.inputs = reader, place, inputs
        self.row = dict.fromkeys(FIELDS, 0) | {"reader": name, "engine": engine}
        for seed in reader.seeds:
            reader.feed(seed)
        self.base = self._resident()

    @staticmethod
    def _resident():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def __call__(self, data):
        if len(data) > 1 << 20:
            return
        content = _content(self.reader, data)
        start = time.process_time()  # of the processor: a busy machine is no finding; a hang is libFuzzer's -timeout
        try:
            loaded = self.reader.feed(content)
            spent = time.process_time() - start
            grown = self._resident() - self.base
            assert spent <= SECONDS, f"{spent:.1f} s"
            assert grown <= 2 * len(content) + MEMORY, f"{grown >> 20} MB"
        except BaseException:
            self.row["findings"] += 1
            (self.place / f"finding-{self.row['inputs']}").write_bytes(data)
            self.note()
            raise
        row = self.row
        row["inputs"] += 1
        row["loaded" if loaded else "refused"] += 1
        row["slowest_s"], row["grown_mb"] = round(max(row["slowest_s"], spent), 4), grown >> 20
        if row["inputs"] % 500 == 0 or row["inputs"] >= self.inputs:
            self.note()

    def note(self):
        (self.place / "figures.json").write_text(json.dumps(self.row))


def _content(reader, data):
    """The first byte says whether the checksum is made right."""
    return reader.repair(data[1:]) if data[:1] < b"\x80" else data[1:]


def _place(corpus, name):
    return corpus / "".join(c if c.isalnum() else "-" for c in name)


class _Sources:
    """Finds fastedit's modules with Python's own loader of sources: what an editable install wraps it in, atheris cannot see."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] != "fastedit":
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(name, path, target) if hasattr(finder, "find_spec") else None
            if spec is not None:
                if (spec.origin or "").endswith(".py"):
                    spec.loader = importlib.machinery.SourceFileLoader(name, spec.origin)
                return spec
        return None


def _rewritten(mutate, data, most, seed):
    """Every other time one value of the JSON in it is another one: bytes changed at random are no JSON any more."""
    draw, data = random.Random(seed), bytes(data)
    size = int.from_bytes(data[1:9], "little")
    at = (9, 9 + size) if size < len(data) else (1, len(data))  # safetensors' header, or all
    try:
        document = json.loads(data[at[0] : at[1]]) if draw.random() < 0.5 else None
    except (ValueError, RecursionError):
        document = None
    places = list(_places(document))
    if not places:
        return mutate(data, most)
    for _ in range(draw.choice((1, 1, 2, 3))):
        parent, key = draw.choice(places)
        kind, other = draw.randrange(4), draw.choice(places)
        try:
            if kind == 0:
                del parent[key]
            elif kind == 1:
                parent[key] = draw.choice(VALUES)
            elif kind == 2:
                parent[key] = json.loads(json.dumps(other[0][other[1]]))
            else:
                value = parent[key]
                parent[key] = value + draw.choice((1, -1, 0.5, 2**31)) if isinstance(value, (int, float)) else [value]
        except (KeyError, IndexError, OverflowError, RecursionError):  # a place that the change before took away
            continue
    try:
        text = json.dumps(document).encode()
    except (ValueError, RecursionError):
        return mutate(data, most)
    if at[0] == 9:
        text += b" " * (-len(text) % 8)
        text = len(text).to_bytes(8, "little") + text
    return (data[:1] + text + data[at[1] :])[:most]


VALUES = (
    None, True, False, 0, 1, -1, 2, 16, 2**31, 2**63, 1e38, 1e999, -0.5, "", "x", "0", "F32", "I64", "a" * 300, "../x", "\ud800",
    [], [0], [0, 0], [1, 16], {}, {"a": 1}, [[[[[]]]]], "mlp", "first 2", "cosine",
)  # fmt: skip


def _places(document):
    """(container, key) of each value in it."""
    for key in list(document) if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ():
        yield document, key
        yield from _places(document[key])


def _mutated(seeds, count, seed=0):
    """Bits flipped, bytes and numbers set, pieces dropped, doubled and moved, ends cut: one to eight of these at a time."""
    draw = random.Random(seed)
    for _ in range(count):
        data = bytearray(draw.choice(seeds))
        for _ in range(draw.randint(1, 8)):
            at, end = sorted(draw.randrange(len(data) + 1) for _ in range(2))
            end = min(end, at + draw.choice((1, 4, 8, 64, len(data))))
            kind = draw.randrange(6)
            if kind == 0 and at < len(data):
                data[at] ^= 1 << draw.randrange(8)
            elif kind == 1:
                data[at:end] = bytes(draw.randrange(256) for _ in range(min(8, end - at)))
            elif kind == 2:
                del data[at:end]
            elif kind == 3:
                data[at:at] = data[at:end]
            elif kind == 4:
                data[at : at + 8] = draw.choice((0, 1, 2**31, 2**63 - 1, 2**64 - 1)).to_bytes(8, "little")
            else:
                data[at:end] = draw.choice((b"null", b"-1", b"1e999", b'"\\ud800"', b"[" * 500, b"{}", b"99999999999999999999"))
        yield bytes([draw.randrange(256)]) + bytes(data)


if __name__ == "__main__":
    sys.exit(main())
