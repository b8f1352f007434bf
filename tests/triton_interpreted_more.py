"""The Triton kernels of moments and value_ascent under Triton's interpreter against a float64 reference.

Not collected by name: test_triton_interpreter.py runs it with TRITON_INTERPRET=1.
"""

import ascent_support
import moments_support
import pytest
import torch
from fastedit.kernels import reference
from fastedit.kernels import triton as backend
from triton_support import BF16, F16, F32, poisoned_memory, view  # noqa: F401


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(
    "rows, width, groups, strided",
    [(1, 64, 0, False), (7, 100, 0, True), (7, 100, 3, False), (300, 100, 0, False), (600, 40, 2, True), (20, 1, 30, False)],
)
def test_moments(rows, width, groups, strided, dtype):
    hidden = (view(rows, width, torch.float32, strided) + 1000).to(dtype)
    group = torch.randint(-1, groups + 1, (rows,), dtype=torch.int32) if groups else None
    found = backend.moments(hidden, group, max(groups, 1))
    moments_support.assert_exact(found, reference.moments(hidden, group, max(groups, 1)))


def test_moments_with_an_outlier_first():
    hidden = torch.randn(300, 33)
    hidden[0] *= 3000
    moments_support.assert_exact(backend.moments(hidden, None, 1), reference.moments(hidden, None, 1))


@pytest.mark.parametrize("units", [1, 70, 257, (40, 33)], ids=str)
def test_value_ascent(units):
    case = ascent_support.make(rows=3, width=45, units=units, steps=12)
    ascent_support.assert_promise(case, backend.value_ascent(*case.arguments()))


def test_value_ascent_of_rows_does_not_depend_on_the_others():
    case = ascent_support.make(rows=3, width=20, units=70, steps=9)
    z, slope, rest = case.z_and_slope()
    from fastedit.kernels.triton.value_ascent import flips

    together = flips(z.clone(), slope.clone(), *rest)
    for r in range(3):
        assert torch.equal(flips(z[r : r + 1].clone(), slope[r : r + 1].clone(), *rest)[0], together[r])
