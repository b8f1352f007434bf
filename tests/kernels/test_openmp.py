"""The CPU kernels find torch's OpenMP at load: one pool of threads in either import order, one thread without any."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastedit.cli import doctor
from fastedit.ops import native

ROOT = Path(__file__).resolve().parents[2]
found = pytest.mark.skipif(
    native._native is None or native._native.OPENMP is None, reason="needs kernels that find their OpenMP at load"
)
LOADED = "sorted({os.path.realpath(line.split()[-1]) for line in open('/proc/self/maps') if 'libgomp' in line})"


def told(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


@found
@pytest.mark.parametrize("first", ["import torch, fastedit._native as n", "import fastedit._native as n; import torch"])
def test_one_pool_in_either_order(first):
    loaded, used = told(f"import os; {first}; assert len({LOADED}) == 1; print(*{LOADED}, os.path.realpath(n.OPENMP))")
    assert loaded == used and "torch" in Path(used).parts


@found
def test_libgomp_is_not_linked():
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    said = subprocess.run(["readelf", "-d", native._native.__file__], capture_output=True, text=True, check=True).stdout
    assert "libstdc++" in said and "gomp" not in said


@found
def test_doctor_says_which(monkeypatch):
    assert doctor.threads(native._native).startswith("shared with torch")

    class Without:
        OPENMP = ""

    assert "one" in doctor.threads(Without) and "no libgomp" in doctor.threads(Without)


DRIVER = r"""
#include <cstdio>
#include <omp.h>
#include "cpu/openmp.h"
int main(int argc, char** argv) {
  fastedit::cpu::find_openmp(argc > 1 ? argv[1] : nullptr);
  int threads[100], sum = 0;
#pragma omp parallel for schedule(static) num_threads(2)
  for (int i = 0; i < 100; ++i) threads[i] = omp_get_num_threads();
  for (int i = 0; i < 100; ++i) sum += threads[i];
  std::printf("%d [%s]\n", sum, fastedit::cpu::openmp_path());
}
"""


@pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="needs GCC on Linux")
def test_without_a_library_there_is_one_thread(tmp_path):
    """Else what the parallel region holds runs on two; both leave no turn of the loop out."""
    (tmp_path / "driver.cpp").write_text(DRIVER)
    compile_ = ["g++", "-O1", "-fopenmp", f"-I{ROOT / 'kernels'}", "-DFASTEDIT_FIND_OPENMP"]
    compile_ += ['-DFASTEDIT_SYSTEM_OPENMP="no-such-lib.so.1"']
    for source in (ROOT / "kernels/cpu/openmp.cpp", tmp_path / "driver.cpp"):
        subprocess.run([*compile_, "-c", source, "-o", tmp_path / f"{source.stem}.o"], check=True)
    driver = tmp_path / "driver"
    subprocess.run(["g++", f"{driver}.o", tmp_path / "openmp.o", "-ldl", "-o", driver], check=True)
    assert subprocess.run([driver], capture_output=True, text=True, check=True).stdout == "100 []\n"
    if native._native is not None and native._native.OPENMP:
        said = subprocess.run([driver, native._native.OPENMP], capture_output=True, text=True, check=True).stdout
        assert said.startswith("200 [") and os.path.samefile(said[5:-2], native._native.OPENMP)
