"""The CUDA compiler and disassembler, where they are, and what they say of a source of kernels/cuda."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
UNITS = sorted((KERNELS / "cuda").glob("*.cu"))


def find_nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def find_cuobjdump():
    """On the PATH, or the one that the triton package carries."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin:
        found = shutil.which("cuobjdump", path=str(Path(spec.origin).parent / "backends/nvidia/bin"))
    return found


def compile_unit(unit, folder, arch="sm_90", flags=()):
    """(cubin, ptxas' report). What is off by default is looked at, too."""
    cubin = Path(folder) / f"{unit.stem}.{arch}.cubin"
    flags = [*flags, *(["-DFASTEDIT_TENSOR"] if "tensor" in unit.stem else [])]
    done = subprocess.run(
        [find_nvcc(), "-std=c++17", "-O3", f"-arch={arch}", "-cubin", "-Xptxas", "-v", f"-I{KERNELS}", *flags,
         str(unit), "-o", str(cubin)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return cubin, done.stderr


def listing(cubin):
    """{kernel's mangled name: [(address, opcode, operands)]}."""
    command = [find_cuobjdump(), "-sass", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pattern = r"/\*([0-9a-f]{4,})\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]*)([^;]*);"
    return {
        part.split(None, 1)[0]: [(int(at, 16), op, operands) for at, op, operands in re.findall(pattern, part)]
        for part in re.split(r"Function : ", text)[1:]
    }


def instructions(cubin):
    """{kernel's mangled name: [(opcode, operands)]}."""
    return {name: [entry[1:] for entry in code] for name, code in listing(cubin).items()}
