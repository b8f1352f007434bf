"""make fuzz: every reader of files on mutated ones. Findings: an exception that is not documented, a second, 100 MB.

    python -m tools.fuzz --inputs 50000 --out bench/results/fuzz.csv           each reader in a process of its own
    python -m tools.fuzz --reader edit.json --inputs 50000 --corpus corpus/     one, which goes on from a kept corpus

With atheris installed (`pip install atheris`), mutations follow the coverage of fastedit's own code, from the inputs kept in
tests/fixtures/corpus on; without, they are random ones of the sound files, and the table says so. Half of the inputs get the
checksum that their writer would make. `--keep` writes the smallest corpus of the same coverage back to tests/fixtures/corpus.
"""

import argparse
import importlib.machinery
import json
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import table

SECONDS, MEMORY = 1.0, 100 << 20
FIELDS = ("reader", "engine", "inputs", "loaded", "refused", "corpus", "edges", "slowest_s", "grown_mb", "findings", "wall_s")
KEPT = Path(__file__).resolve().parent.parent / "tests/fixtures/corpus"
SMALL = 4096  # bytes of an input that is kept in the repository


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", help="one of tools/readers.py; all by default")
    parser.add_argument("--inputs", type=int, default=50_000, help="for each reader")
    parser.add_argument("--corpus", type=Path, default=Path("build/fuzz"), help="kept, and gone on from")
    parser.add_argument("--keep", action="store_true", help="no mutations: the corpus, as small as its coverage lets, is kept")
    parser.add_argument("--out", type=Path, help="a CSV, one row a reader")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        return _child(asked)
    from .readers import readers

    with tempfile.TemporaryDirectory() as folder:
        names = [asked.reader] if asked.reader else list(readers(folder))
    rows = [_one(name, asked) for name in names]
    table(rows, asked.out)
    return 1 if any(row["findings"] for row in rows) else 0


def _one(name, asked):
    place = _place(asked.corpus, name)
    place.mkdir(parents=True, exist_ok=True)
    line = [sys.executable, "-m", "tools.fuzz", "--child", "--reader", name]
    line += ["--inputs", str(asked.inputs), "--corpus", str(place), *(["--keep"] if asked.keep else [])]
    start = time.monotonic()
    with open(place / "log", "w") as log:
        done = subprocess.run(line, stdout=log, stderr=log)
    said = (place / "log").read_text(errors="replace")
    try:
        row = json.loads((place / "figures.json").read_text())
    except (OSError, ValueError):
        row = dict.fromkeys(FIELDS, 0) | {"reader": name}
    if done.returncode:
        row["findings"] = max(1, row["findings"])
        print(said[-4000:], file=sys.stderr)
    elif asked.keep:
        shutil.rmtree(_place(KEPT, name), ignore_errors=True)
        shutil.copytree(place / "kept", _place(KEPT, name))
    row["edges"] = max(map(int, re.findall(r" cov: (\d+)", said)), default=0)
    row["corpus"] = len(list((place / ("kept" if asked.keep else "corpus")).glob("*")))
    if row["engine"] == "atheris" and not row["edges"]:
        row["findings"] = max(1, row["findings"])
        print("libFuzzer saw no coverage", file=sys.stderr)
    row["wall_s"] = round(time.monotonic() - start, 1)
    print(row, flush=True)
    return row


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
        content = self.reader.repair(data[1:]) if data[:1] < b"\x80" else data[1:]
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


def _child(asked):
    try:
        import atheris
    except ImportError:
        atheris = None
    if atheris is not None:
        sys.meta_path.insert(0, _Sources())
        with atheris.instrument_imports(include=["fastedit"]):
            from .readers import readers
    else:
        from .readers import readers
    shared, place = Path("/dev/shm"), asked.corpus
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        reader = readers(folder)[asked.reader]
        feeder = Feeder(reader, asked.reader, place, "random" if atheris is None else "atheris", asked.inputs)
        if atheris is None:
            for data in _mutated(reader.seeds, asked.inputs):
                feeder(data)
            return 0
        if atheris._reserve_counter() < 100:
            raise SystemExit("atheris instrumented nothing of fastedit: its mutations would follow no coverage")
        seeds = place / "corpus"
        seeds.mkdir(exist_ok=True)
        for number, seed in enumerate(reader.seeds):
            for first in (b"\0", b"\xff"):
                (seeds / f"seed-{number}-{first[0]}").write_bytes(first + seed)
        words = sorted({word for seed in reader.seeds for word in re.findall(rb"[A-Za-z_][\w .]{2,30}", seed)})
        (place / "words").write_text("".join(f'"{word.decode()}"\n' for word in words))
        options = [f"-runs={asked.inputs}", "-max_len=65536", "-len_control=0", "-timeout=120", "-rss_limit_mb=0"]
        if asked.keep:
            shutil.rmtree(place / "kept", ignore_errors=True)
            (place / "kept").mkdir()
            arguments = ["-merge=1", f"-max_len={SMALL}", str(place / "kept"), str(seeds)]
        else:
            kept = [str(path) for path in [_place(KEPT, asked.reader)] if path.is_dir()]
            arguments = [str(seeds), *kept, f"-dict={place / 'words'}", *options]
        atheris.Setup([sys.argv[0], *arguments], feeder, custom_mutator=lambda *given: _rewritten(atheris.Mutate, *given))
        atheris.Fuzz()
    return 0


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
