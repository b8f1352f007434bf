"""Runs triton_interpreted*.py under TRITON_INTERPRET=1, which must be set before the kernels are first
imported and stays for good: hence a process of its own, whatever else this one imports."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

FOLDER = Path(__file__).parents[1]
FILES = sorted(path.name for path in FOLDER.glob("triton_interpreted*.py"))


@pytest.mark.slow
def test_kernels_under_the_interpreter():
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", *FILES, "-q", "-p", "no:cacheprovider", "--color=no", "-rf"]
    done = subprocess.run(command, env=env, cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout[-2000:]
    assert "skipped" not in done.stdout, done.stdout[-2000:]
