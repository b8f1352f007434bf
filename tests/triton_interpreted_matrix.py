"""The matrix of edits and edge cases (training/test_matrix.py) on the Triton kernels under Triton's interpreter.

Not collected by name: test_triton_interpreter.py runs it with TRITON_INTERPRET=1.
"""

import pytest
from test_matrix import CASES, DTYPES, KINDS, check, pytestmark  # noqa: F401
from triton_support import poisoned_memory  # noqa: F401

from fastedit import dispatch

SITES = ("k", "attn", "ffn_in", "mlp", "block")  # an edit alone, an edit's add, another width, the norm that follows


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_formulas(kind, case, dtype, site, fused, monkeypatch):
    monkeypatch.setenv("FASTEDIT_BACKEND", "triton")
    dispatch.select.cache_clear()
    check(kind, case, DTYPES[dtype], site, fused)
    dispatch.select.cache_clear()
