"""Mutated files of every kind: the documented error alone, soon, and without much memory. `make fuzz` does it at length."""

import importlib.machinery
import json
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seed_of_hypothesis
from hypothesis import strategies as st

from tools import fuzz
from tools.fuzz import Feeder, _mutated
from tools.readers import readers


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return readers(tmp_path_factory.mktemp("fuzzed"))


def test_each_reader_refuses_by_its_own_error(made, tmp_path):
    assert len(made) >= 10
    for name, reader in made.items():
        feeder = Feeder(reader, name, tmp_path, "random", 120)
        for data in _mutated(reader.seeds, 120, seed=name):
            feeder(data)
        assert feeder.row["refused"] > 40, name
        reader.path.write_bytes(reader.seeds[0])


def cut_and_fed(whole, feeder):
    piece = st.tuples(st.integers(0, len(whole)), st.integers(0, 16), st.binary(max_size=16))

    @seed_of_hypothesis(0)
    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from([b"\0", b"\xff"]), st.lists(piece, min_size=1, max_size=4))
    def feed(first, pieces):
        data = whole
        for at, cut, put in pieces:
            data = data[:at] + put + data[at + cut :]
        feeder(first + data)

    feed()


def test_each_reader_refuses_what_hypothesis_makes_of_its_files(made, tmp_path):
    """One to four pieces cut out of a sound file and others put in; what fails comes in its smallest form."""
    for name, reader in made.items():
        seed, feeder = reader.seeds[0], Feeder(reader, name, tmp_path, "hypothesis", 60)
        cut_and_fed(seed, feeder)
        assert feeder.row["inputs"] >= 50 and feeder.row["refused"] > 15, (name, feeder.row)
        reader.path.write_bytes(seed)


def test_each_reader_reads_the_kept_corpus(made, tmp_path):
    """tests/fixtures/corpus: what `make fuzz` found to run other lines, and starts from."""
    assert sum(path.stat().st_size for path in fuzz.KEPT.rglob("*") if path.is_file()) < 64 << 10
    for name, reader in made.items():
        feeder = Feeder(reader, name, tmp_path, "kept", len(fuzz.kept(name)))
        for data in fuzz.kept(name):
            feeder(data)
        assert feeder.row["refused"] >= 3, f"{name}: python -m tools.fuzz --keep"
        reader.path.write_bytes(reader.seeds[0])


def test_the_smallest_corpus_runs_the_same_lines(made):
    reader = made["directions"]
    seed = reader.seeds[0]
    inputs = sorted({b"\xff" + data for data in (seed, seed[:-1], seed[:7], seed[:6], b"", b"x" * 20)})
    chosen = fuzz.smallest(reader, inputs)
    assert b"\xff" + seed in chosen and not {b"\xff" + seed[:6], b"\xff" + seed[:7]} <= set(chosen), "one of two alike"
    lines = [set().union(*(fuzz.lines_of(reader, data) for data in some)) for some in (inputs, chosen)]
    assert lines[0] == lines[1] and len(lines[0]) > 20
    reader.path.write_bytes(seed)


def test_a_fuzzer_sees_the_sources_behind_an_editable_install():
    """What `pip install -e` wraps the loader in, atheris cannot instrument: its mutations would follow no coverage."""
    finder = fuzz._Sources()
    sys.meta_path.insert(0, finder)
    try:
        for name in ("fastedit.files.sealed", "fastedit.patching"):
            spec = finder.find_spec(name, sys.modules["fastedit"].__path__)
            assert type(spec.loader) is importlib.machinery.SourceFileLoader and spec.origin.endswith(".py")
    finally:
        sys.meta_path.remove(finder)


@pytest.mark.parametrize("name", ["edit.json", "rows"])
def test_a_fuzzer_rewrites_json_by_its_values(made, name):
    seed = b"\0" + made[name].seeds[0]
    found = {fuzz._rewritten(lambda data, most: b"", seed, 1 << 16, number) for number in range(200)} - {b""}
    assert len(found) > 50 and seed not in found
    for content in found:
        at = 9 if name == "rows" else 1
        size = int.from_bytes(content[1:9], "little") if name == "rows" else len(content)
        assert isinstance(json.loads(content[at : at + size]), (dict, list))
