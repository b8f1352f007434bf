"""Mutated files of every kind: the documented error alone, soon, and without much memory. `make fuzz` does it at length."""

import pytest

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
