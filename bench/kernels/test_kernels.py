"""The same cases under pytest-benchmark, for its tables and comparisons:

    python -m pytest bench/kernels/test_kernels.py --benchmark-group-by=param:case -k "edit_add and bf16"

Ratios to quote come from `python -m bench.kernels`, which interleaves the variants.
"""

import pytest
import torch

from bench.kernels import cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [c for c in cases.cut(False, DEVICE) if c.width <= 4096 and c.rows <= 512 and c.dtype != "fp16"]


@pytest.mark.parametrize("variant", ["fastedit", "eager", "copy"])
@pytest.mark.parametrize("case", CASES, ids=cases.Case.id)
def test_kernels(benchmark, case, variant):
    call = cases.variants(case, DEVICE)
    if variant not in call:
        pytest.skip(f"{case.op} has no variant {variant} over slots")
    benchmark.extra_info["bytes"] = case.bytes()

    def run():
        call[variant]()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=7, iterations=3, warmup_rounds=2)
