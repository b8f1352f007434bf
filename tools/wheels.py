"""`make wheels`: a wheel looked at, repaired to the tag it reaches, and tried where there is no compiler.

    python -m tools.wheels dist/raw/*.whl --out dist     # repair, install into an empty environment, try
    python tools/wheels.py --here                        # try what is installed in this environment
"""

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

SETS = ("baseline", "avx2", "avx512")

# Runs in the environment that is tried; FIRST is what it imports first.
TRIAL = """
import os, shutil
{first}
import torch
from fastedit import _native, ops
from fastedit.edits.form import Form

loaded = {{os.path.realpath(line.split()[-1]) for line in open("/proc/self/maps") if "libgomp" in line}}
assert len(loaded) <= 1, f"two pools of threads: {{loaded}}"
assert shutil.which("g++") is None or {here}, "a compiler is in sight"
h, r = torch.randn(300, 1000), torch.randn(300, 1000)
form = Form(torch.randn(1000), torch.randn(1000), torch.randn(4, 1000), torch.randn(4), torch.randn(4, 1000))
exact = r.double() + Form(*(t.double() for t in form.tensors()))(h.double())
tried = []
for name in {sets!r}:
    try:
        _native.set_instruction_set(name)
    except ValueError:
        continue
    tried.append(name)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        error = (ops.edit_add(h, r, *form.tensors()).double() - exact).abs().max() / exact.abs().max()
        assert error < 1e-5, (name, threads, float(error))
print("kernels right on", ", ".join(tried), "| threads:", _native.OPENMP or "one", "| CUDA:", _native.CUDA_ARCHITECTURES or "no")
"""


def tries(python, environment, here=False):
    """Run the trial with either import first."""
    for first in ("import torch", "import fastedit._native"):
        code = TRIAL.format(first=first, sets=SETS, here=here)
        subprocess.run([python, "-I", "-c", code], check=True, env=environment, cwd=tempfile.gettempdir())


def repaired(wheel, out):
    """The wheel under the manylinux tag that auditwheel finds for it."""
    out.mkdir(parents=True, exist_ok=True)
    before = set(out.glob("*.whl"))
    tools = [sys.executable, "-m", "auditwheel"]
    subprocess.run([*tools, "show", wheel], check=True)
    subprocess.run([*tools, "repair", "--exclude", "libgomp.so.1", "--wheel-dir", out, wheel], check=True)
    (made,) = set(out.glob("*.whl")) - before
    return made


def in_an_empty_environment(wheel):
    """Install the wheel where nothing else is, with no compiler in sight; torch and others are this environment's."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "venv")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
        python = place / "bin" / "python"
        install = ["install", "--quiet", "--no-index", "--no-deps", "--no-compile", wheel]
        subprocess.run([sys.executable, "-m", "pip", "--python", python, *install], check=True)
        site = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True, text=True,
                              capture_output=True).stdout.strip()  # fmt: skip
        # A line each, so that their own .pth files, an editable fastedit's among them, are not obeyed.
        others = [path for path in sys.path if path.endswith("site-packages")] or [sysconfig.get_path("purelib")]
        Path(site, "others.pth").write_text("\n".join(others) + "\n")
        environment = {"PATH": str(place / "bin"), "HOME": folder, "LANG": "C.UTF-8"}
        tries(python, environment)
        subprocess.run([place / "bin" / "fastedit", "doctor"], check=True, env=environment | {"COLUMNS": "150"}, cwd=folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, default=Path("dist"))
    parser.add_argument("--here", action="store_true")
    given = parser.parse_args()
    if given.here:
        tries(sys.executable, dict(os.environ), here=True)
    for wheel in given.wheels:
        made = repaired(wheel, given.out)
        in_an_empty_environment(made.absolute())
        print(f"made {made}: the tag reached is {made.stem.rpartition('-')[2]}")


if __name__ == "__main__":
    main()
