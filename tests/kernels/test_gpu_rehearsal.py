"""The steps of `make gpu` (bench/gpu): how they are run, and all of them on the CPU, small, with stubs for what profiles."""

import argparse
import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu import __main__ as gpu

ROOT = Path(__file__).resolve().parents[2]
STUB = """#!/bin/sh
echo "stub $(basename "$0") $1"
while [ "$1" != "{python}" ]; do shift; done
exec "$@"
"""


def options(out, **given):
    made = {"out": out, "more": False, "step": None, "rehearse": False, "pybind11": None, "python": sys.executable}
    return argparse.Namespace(**made | given)


def step(name, code, seconds=20, **more):
    return gpu.Step(name, seconds, (sys.executable, "-c", code), **more)


def table(path):
    with path.open(newline="") as file:
        return {row["step"]: row for row in csv.DictReader(file)}


def test_a_step_may_fail_hang_or_be_left_out_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    child = "[sys.executable, '-c', 'import time; time.sleep(60)']"
    hangs = f"import subprocess, sys; print('begun', flush=True); subprocess.run({child})"
    listed = [
        step("breaks", "print('before'); raise SystemExit(7)"), step("hangs", hangs, 2),
        step("absent", "", needs="no-such-profiler"), gpu.Step("unknown", 5, ("/no/such/program",)),
        step("writes", "print('rows')", into="rows.csv"), step("works", "print('a line'); print('the last')"),
    ]  # fmt: skip
    monkeypatch.setattr(gpu, "steps", lambda options: listed)
    assert gpu.run_all(options(tmp_path)) == 3
    found = table(tmp_path / "gpu-steps.csv")
    assert [row["status"] for row in found.values()] == ["failed (7)", "time over", "left out", "failed", "ok", "ok"]
    assert found["breaks"]["last line"] == "before" and found["hangs"]["last line"] == "begun"
    assert float(found["hangs"]["seconds"]) < 20
    assert found["absent"]["last line"] == "no-such-profiler is not here" and found["works"]["last line"] == "the last"
    assert (tmp_path / "rows.csv").read_text() == "rows\n"
    assert "works     ok" in capsys.readouterr().out


def test_what_travels_back_is_few_files_and_what_is_asked_for_fits(tmp_path):
    """Eight files at most come back from a lent machine, and a command has ten minutes."""
    for more in (False, True):
        made = options(tmp_path, more=more)
        listed = list((gpu.more_steps if more else gpu.steps)(made))
        assert len({s.name for s in listed}) == len(listed) >= 5
    assert sum(s.seconds for s in gpu.steps(options(tmp_path))) < 600
    assert [s.name for s in gpu.steps(options(tmp_path))] == [
        "build", "check", "speed", "profile", "tests", "decode", "triton", "bits", "tensor",
    ]  # fmt: skip
    files = {
        "gpu-steps.csv",
        "gpu.log",
        "gpu-check.csv",
        "gpu-check-triton.csv",
        "gpu-speed.csv",
        "gpu-ncu.csv",
        "gpu-decode.csv",
        "gpu-tensor.csv",
    }
    sources = "".join(path.read_text() for path in (ROOT / "bench/gpu").glob("*.py"))
    assert len(files) <= 8 and all(name.removesuffix("-triton.csv").split(".")[0] in sources for name in files)


def test_headers_from_a_folder_reach_the_build(tmp_path):
    build = next(s for s in gpu.steps(options(tmp_path)) if s.name == "build")
    made = gpu.environment(options(tmp_path, pybind11=str(tmp_path)), build)
    assert made["pybind11_ROOT"] == str(tmp_path) and made["CPLUS_INCLUDE_PATH"].endswith(f"{tmp_path}/include")
    assert made["FASTEDIT_CUDA"] == "ON" and made["FASTEDIT_CUDA_ARCHITECTURES"]
    assert "--no-index" in build.command and "--no-build-isolation" in build.command


@pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("g++") is None, reason="needs cmake and g++")
@pytest.mark.parametrize("version", [(3, 1), (3, 0)])
def test_cmake_takes_headers_without_a_package(tmp_path, version):
    """As where pybind11 came along as headers alone; torch has older ones among its own, which do not serve."""
    common = tmp_path / "headers/pybind11/detail/common.h"
    common.parent.mkdir(parents=True)
    common.write_text("#define PYBIND11_VERSION_MAJOR {}\n#define PYBIND11_VERSION_MINOR {}\n".format(*version))
    env = gpu.environment(options(tmp_path, pybind11=str(tmp_path / "headers")), step("build", ""))
    defined = ("FASTEDIT_CUDA=OFF", f"Python_EXECUTABLE={sys.executable}", "CMAKE_DISABLE_FIND_PACKAGE_pybind11=ON")
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), *(f"-D{d}" for d in defined)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (version >= (3, 1)), done.stderr
    if version < (3, 1):
        assert "pybind11 3.1 or newer is needed" in done.stderr and "headers 3.0" in " ".join(done.stderr.split())


def rehearse(tmp_path, *arguments):
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("ncu", "compute-sanitizer"):
        (folder / name).write_text(STUB.format(python=sys.executable))
        (folder / name).chmod(0o755)
    env = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST_")}
    env |= {"PATH": f"{folder}{os.pathsep}{env['PATH']}", "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "bench.gpu", "--rehearse", "--out", str(tmp_path / "out"), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    log = "".join(path.read_text()[-6000:] for path in (tmp_path / "out").glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + log
    return tmp_path / "out"


@pytest.mark.slow
def test_the_whole_script_on_stub_devices(tmp_path):
    out = rehearse(tmp_path)
    found = table(out / "gpu-steps.csv")
    assert {row["status"] for row in found.values()} == {"ok"}
    assert list(found) == ["build", "check", "speed", "profile", "tests", "decode"]
    checks = list(csv.DictReader((out / "gpu-check.csv").open()))
    assert {r["op"] for r in checks} == {"edit", "edit_add", "edit_add_norm"} and {r["verdict"] for r in checks} == {
        "ok"
    }
    assert {"output 0", "d_x", "d_scale", "d_read", "d_weight"} <= {r["of"] for r in checks}
    speeds = list(csv.DictReader((out / "gpu-speed.csv").open()))
    assert {"copy", "add", "edit_add"} <= {r["op"] for r in speeds} and all(float(r["us_p50"]) > 0 for r in speeds)
    steps = {(r["what"], r["how"]) for r in csv.DictReader((out / "gpu-decode.csv").open())}
    assert {("edited", "eager"), ("edited", "CUDA graph"), ("ops.edit_add", "host")} <= steps
    assert (out / "gpu-ncu.csv").read_text().startswith("stub ncu")
    assert len(list(out.iterdir())) <= 8


@pytest.mark.slow
def test_the_sanitizers_calls_on_stub_devices(tmp_path):
    found = table(rehearse(tmp_path, "--more") / "gpu-more-steps.csv")
    assert [row["status"] for row in found.values()] == ["ok", "ok"]
    assert found["memcheck"]["last line"].endswith("26 calls")
