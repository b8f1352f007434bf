"""make fuzz: every reader of files on mutated ones. Findings: an exception that is not documented, a second, 100 MB.

    python -m tools.fuzz --inputs 50000 --out bench/results/fuzz.csv           each reader in a process of its own
    python -m tools.fuzz --reader edit.json --inputs 50000 --corpus corpus/     one, which goes on from a kept corpus

With atheris installed (`pip install atheris`), mutations follow the coverage of fastedit's own code; without, they are
random ones of the sound files, and the table says so. Half of the inputs get the checksum that their writer would make.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import table

SECONDS, MEMORY = 1.0, 100 << 20
FIELDS = ("reader", "engine", "inputs", "loaded", "refused", "slowest_s", "grown_mb", "findings", "wall_s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", help="one of tools/readers.py; all by default")
    parser.add_argument("--inputs", type=int, default=50_000, help="for each reader")
    parser.add_argument("--corpus", type=Path, default=Path("build/fuzz"), help="kept, and gone on from")
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
    place = asked.corpus / "".join(c if c.isalnum() else "-" for c in name)
    place.mkdir(parents=True, exist_ok=True)
    line = [sys.executable, "-m", "tools.fuzz", "--child", "--reader", name]
    line += ["--inputs", str(asked.inputs), "--corpus", str(place)]
    start = time.monotonic()
    done = subprocess.run(line, capture_output=True, text=True)
    try:
        row = json.loads((place / "figures.json").read_text())
    except (OSError, ValueError):
        row = dict.fromkeys(FIELDS, 0) | {"reader": name}
    if done.returncode:
        row["findings"] = max(1, row["findings"])
        print(done.stdout[-2000:], done.stderr[-4000:], file=sys.stderr)
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
        start = time.process_time()  # of the processor: a busy machine is no finding; a hang is libFuzzer's own -timeout
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


def _child(asked):
    try:
        import atheris
    except ImportError:
        atheris = None
    if atheris is not None:
        with atheris.instrument_imports(include=["fastedit"]):
            from .readers import readers
    else:
        from .readers import readers
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        reader = readers(folder)[asked.reader]
        feeder = Feeder(reader, asked.reader, asked.corpus, "random" if atheris is None else "atheris", asked.inputs)
        if atheris is None:
            for data in _mutated(reader.seeds, asked.inputs):
                feeder(data)
            return 0
        seeds = asked.corpus / "corpus"
        seeds.mkdir(exist_ok=True)
        for number, seed in enumerate(reader.seeds):
            for first in (b"\0", b"\xff"):
                (seeds / f"seed-{number}-{first[0]}").write_bytes(first + seed)
        options = [f"-runs={asked.inputs}", "-max_len=65536", "-timeout=10", "-rss_limit_mb=0", "-verbosity=0"]
        atheris.Setup([sys.argv[0], str(seeds), *options], feeder)
        atheris.Fuzz()
    return 0


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
