"""moments and value_ascent of kernels/cuda under the emulator; see emulated_cases.py."""

import importlib

import ascent_support
import emulated_cases as emulated
import pytest
import torch
from emulated_cases import BF16, F32, HALF, cuda, plain_schedule, pytestmark, stream
from moments_support import assert_exact as assert_exact_moments

reference = emulated.reference
__all__ = ["cuda", "plain_schedule", "pytestmark"]


@pytest.mark.parametrize("dtype", [F32, BF16, HALF], ids=emulated.names)
@pytest.mark.parametrize(
    ("rows", "width", "groups", "view"),
    [(1, 64, 0, "plain"), (7, 1, 2, "plain"), (7, 100, 3, "strided"), (300, 104, 0, "unaligned"), (700, 264, 3, "plain"),
     (5, 33, 40, "plain")],
)  # fmt: skip
def test_moments(cuda, rows, width, groups, view, dtype):
    hidden = stream(rows, width, dtype, view) + 1000
    group = torch.randint(-1, groups + 1, (rows,), dtype=torch.int32) if groups else None
    count, *exact = reference.moments(hidden, group, max(groups, 1))
    results = []
    for seed, multiprocessors in ((0, 3), (1, 100), (7, 1)):
        cuda.schedule(multiprocessors, seed)
        results.append(cuda.moments(hidden, group, max(groups, 1)))
        assert_exact_moments((count, *results[-1]), (count, *exact))
    assert all(emulated.same_bits(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def test_moments_of_rows_after_a_huge_one(cuda):
    hidden = torch.randn(300, 64)
    hidden[0] *= 3000
    count, *exact = reference.moments(hidden, None, 1)
    assert_exact_moments((count, *cuda.moments(hidden, None, 1)), (count, *exact))


def test_moments_read_each_row_once_but_for_a_blocks_sample(cuda):
    cuda.moments(stream(512, 256, BF16), None, 1)
    assert cuda.moved["hidden"][0] == 1 + 32 / 256  # of 256 rows the first 32 are read for the shift, too


@pytest.mark.parametrize("units", [1, 33, 70, 300, 1100])
def test_value_ascent_steps(cuda, units):
    ascent = importlib.import_module(f"{reference.__name__}.value_ascent")
    case = ascent_support.make(rows=3, width=45, units=units, steps=8)
    results = []
    for seed in (0, 1, 7):
        cuda.schedule(3, seed)
        results.append(ascent.ascend(*case.arguments(), cuda.total_gradient))
        ascent_support.assert_promise(case, results[-1])
    assert all(emulated.same_bits(result, results[0]) for result in results)
    z, slope, rest = case.z_and_slope()
    alone = [cuda.total_gradient(z[r : r + 1].clone(), slope[r : r + 1].clone(), *rest) for r in range(3)]
    assert emulated.same_bits(torch.cat(alone), cuda.total_gradient(z, slope, *rest))


def test_value_ascent_of_a_net_beyond_the_shared_memory_is_refused(cuda):
    from fastedit.ops.native import MAX_UNITS

    cuda.schedule(shared_kib=99)
    z, head = torch.ones(1, MAX_UNITS), torch.ones(MAX_UNITS)
    cuda.total_gradient(z, z, head, torch.empty(0), 1, 0.5)  # one step reads no row of the Gram matrix
    z, head = torch.ones(1, 7000), torch.ones(7000)
    with pytest.raises(AssertionError, match="error 9"):
        cuda.total_gradient(z, z, head, torch.empty(0), 1, 0.5)
