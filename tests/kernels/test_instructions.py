"""Instructions of the CPU kernels per element, counted by callgrind: a regression guard no timing can blur.

Valgrind knows no AVX-512, so this is the AVX2 code. A count is that of 100 calls less that of none, over 16 rows of
1024. Compilers differ by some percent; the limits are the counts of g++ 12 and a tenth more.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from fastedit import _native

SCRIPT = pathlib.Path(__file__).parents[1] / "instruction_counts.py"
CALLS, ELEMENTS = 100, 16 * 1024
COUNTED = {  # (op, dtype): instructions an element with g++ 12; a 4 behind the op is its rank
    ("edit_add", "fp32"): 1.003,
    ("edit_add", "bf16"): 2.347,
    ("edit_add4", "fp32"): 3.675,
    ("edit_add_norm", "fp32"): 2.416,
    ("edit_add_norm", "bf16"): 4.878,
    ("edit_backward", "fp32"): 2.441,
    ("edit_backward", "bf16"): 3.778,
    ("edit_add_norm_backward", "bf16"): 8.338,
    ("project", "fp32"): 1.464,
}

if shutil.which("valgrind") is None:
    pytest.skip("needs valgrind", allow_module_level=True)
if not hasattr(_native, "raw") or os.uname().machine != "x86_64":
    pytest.skip("needs the native module on x86-64", allow_module_level=True)


@pytest.fixture(scope="module")
def counts():
    """Instructions an element of every case: under one valgrind, in processes forked from one that has started."""
    cases = [(*case, str(calls)) for case in COUNTED for calls in (0, CALLS)]
    done = subprocess.run(
        ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", sys.executable, SCRIPT, *sum(cases, ())],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "FASTEDIT_POISON": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    collected = dict(re.findall(r"==(\d+)== Collected : (\d+)", done.stderr))
    found = [int(collected[process]) for process in done.stdout.split()]
    return {case: (found[2 * n + 1] - found[2 * n]) / (CALLS * ELEMENTS) for n, case in enumerate(COUNTED)}


@pytest.mark.parametrize("case", COUNTED, ids="-".join)
def test_instructions_of_a_kernel(counts, case):
    assert counts[case] <= 1.1 * COUNTED[case], f"{counts[case]:.3f} instructions an element, {COUNTED[case]} before"
    assert counts[case] >= 0.5 * COUNTED[case], "far fewer than was counted: did the kernel run at all?"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_edit_costs_a_few_instructions_beyond_the_plain_norm(counts, dtype):
    """edit_add reads two streams and writes one: the norm behind it must not cost a third and fourth pass."""
    assert counts["edit_add_norm", dtype] < 3 * counts["edit_add", dtype]
