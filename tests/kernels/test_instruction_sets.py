"""The CPU kernels of the instruction sets that this processor has beside the one it is served with."""

import os
import pathlib
import subprocess
import sys

import pytest

from fastedit import _native

OPS = pathlib.Path(__file__).parents[1] / "ops"

if not hasattr(_native, "raw") or os.uname().machine != "x86_64":
    pytest.skip("needs the native module on x86-64", allow_module_level=True)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set_keeps_the_numerics_promise(isa):
    usual = _native.instruction_set()
    if isa == usual:
        pytest.skip("every other test runs with it")
    try:
        _native.set_instruction_set(isa)
    except ValueError:
        pytest.skip(f"this processor has no {isa}")
    finally:
        _native.set_instruction_set(usual)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-k", "cpu", OPS / "test_ops.py", OPS / "test_nan.py"],
        env=os.environ | {"FASTEDIT_CPU_ISA": isa}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
