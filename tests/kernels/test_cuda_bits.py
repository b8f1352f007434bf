"""bench/gpu/bits.json, by which `make gpu` compares the GPU's bits with the emulator's, is what the emulator computes."""

import json

from emulated_cases import cuda, plain_schedule, pytestmark

from bench.gpu import bits

__all__ = ["cuda", "plain_schedule", "pytestmark"]


def test_the_checked_in_bits_are_the_emulators(cuda):
    expected = json.loads(bits.FILE.read_text())
    assert len(expected) == 3 * 3 * (3 * 5 - 1)
    cuda.schedule(132, 5, shared_kib=99)  # another chip and order than those that wrote the file
    assert bits.digests(cuda) == expected
