"""Which architectures CMake builds the CUDA kernels for, by what a compiler lists. Compilers here are shell scripts."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WANTED = "80 86 89 90 100 120"
pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")


def chosen(tmp_path, script):
    compiler, list_file = tmp_path / "nvcc", tmp_path / "ask.cmake"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    list_file.write_text(
        f'include("{ROOT}/cmake/cuda_architectures.cmake")\nknown_cuda_architectures(found "{compiler}" {WANTED})\n'
        'message("chosen=${found}")\n'
    )
    done = subprocess.run(["cmake", "-P", str(list_file)], capture_output=True, text=True, check=False)
    lines = [line.removeprefix("chosen=") for line in done.stderr.splitlines() if line.startswith("chosen=")]
    return lines[0] if lines else " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("sm_75 sm_80 sm_86 sm_88 sm_89 sm_90 sm_100 sm_103 sm_120 sm_121", "80-real;86-real;89-real;90-real;100-real;120"),
        ("sm_50 sm_75 sm_80 sm_86 sm_87 sm_89 sm_90 sm_90a", "80-real;86-real;89-real;90"),  # 12.4
        ("sm_70 sm_80 sm_86 sm_87", "80-real;86"),  # 11.4
        ("sm_103 sm_110 sm_1200", ""),
    ],
    ids=["13.0", "12.4", "11.4", "other"],
)  # fmt: skip
def test_the_architectures_that_the_compiler_knows(tmp_path, listed, expected):
    found = chosen(tmp_path, f"printf '%s\\n' {listed}")
    if "sm_80" in listed:
        assert found == expected
    else:  # names that only begin alike are not known
        assert "makes code for none of" in found and "FASTEDIT_CUDA_ARCHITECTURES" in found


def test_a_compiler_that_cannot_say_is_given_all(tmp_path):
    assert chosen(tmp_path, "exit 1") == "80-real;86-real;89-real;90-real;100-real;120"
