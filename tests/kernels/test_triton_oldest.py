"""The Triton kernels compiled ahead of time by the oldest Triton that is served, 3.6, which comes with torch 2.11.

FASTEDIT_TRITON_36 names a folder with it (`make test` fills one). Another Triton of the same process is not possible: hence
a process of its own. One target there, and every kernel: where the two
Tritons part is in front of the targets.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
OLDEST = os.environ.get("FASTEDIT_TRITON_36")


@pytest.mark.timeout(1500)
@pytest.mark.skipif(not OLDEST, reason="needs FASTEDIT_TRITON_36: the folder of pip install --target ... triton==3.6.0")
def test_every_kernel_compiles_on_the_oldest_triton():
    env = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST_")}
    env |= {"PYTHONPATH": OLDEST, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-c", "import triton; print(triton.__version__)"], env=env, capture_output=True, text=True
    )
    assert found.stdout.strip() == "3.6.0", found.stdout + found.stderr
    command = [sys.executable, "-m", "pytest", "test_triton_aot.py", "test_triton_gate_aot.py", "-q", "-p", "no:cacheprovider",
               "--color=no", "-rf", "-k", "sm_90 and (128_bits or one_launch)"]  # fmt: skip
    done = subprocess.run(command, env=env, cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]
