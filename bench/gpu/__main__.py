"""The steps of first contact with a GPU, in the order of what they teach, each with a time limit and allowed to fail.

    make gpu OUT=folder          (GPU_PYTHON=python3, PYBIND11=a folder with its headers)
    python -m bench.gpu --out folder [--more] [--step NAME ...] [--rehearse]

Needs no network and nothing but a checkout, nvcc, and a Python with torch, Triton, transformers, pytest and xdist. Results
are on the disk as they come: gpu-steps.csv says how each step ended, gpu.log holds all that they printed, the others what
they measured; eight files, and six of --more in theirs. A profiler or a sanitizer that is missing or refused ends its
own step only. --rehearse runs every step on the CPU with small shapes: what a machine without a GPU can say of the script.
"""

import argparse
import csv
import dataclasses
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
TESTS = ("gpu", "gpu_gates", "ops", "gates_in_kernels", "nan", "moments", "value_ascent", "frameworks_page", "modes_compiled",
         "matrix")  # fmt: skip
KERNELS = "regex:stream_rows|tile_rows|column_sums|unit_backward"
METRICS = ",".join(
    (
        "gpu__time_duration.sum", "dram__throughput.avg.pct_of_peak_sustained_elapsed", "dram__bytes.sum",
        "smsp__issue_active.avg.pct_of_peak_sustained_active", "sm__warps_active.avg.pct_of_peak_sustained_active",
        *(f"smsp__average_warps_issue_stalled_{why}_per_issue_active.ratio"
          for why in ("long_scoreboard", "short_scoreboard", "barrier", "lg_throttle", "mio_throttle", "wait", "not_selected")),
    )
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Step:
    name: str
    seconds: int
    command: tuple
    needs: str = ""  # a program without which the step is left out
    into: str = ""  # a file for what it prints
    environment: tuple = ()


def architecture():
    """The first GPU's compute capability without its dot; 90 where nobody knows."""
    ask = shutil.which("nvidia-smi")
    command = [ask, "--query-gpu=compute_cap", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout if ask else ""
    return said.splitlines()[0].strip().replace(".", "") if said.strip() else "90"


def steps(options):
    python, out, rehearse = options.python, str(options.out), options.rehearse
    module = (python, "-m")
    build = (
        *module,
        "pip",
        "install",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "--target",
        str(ROOT / "build/gpu"),
    )
    if rehearse:  # everything up to the compiler
        build = (*module, "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--dry-run")
    names = TESTS[:1] if rehearse else TESTS
    files = [
        str(path.relative_to(ROOT)) for name in names for path in sorted((ROOT / "tests").rglob(f"test_{name}.py"))
    ]
    pytest = (*module, "pytest", "-q", "-m", "gpu", *files, "-p", "no:cacheprovider")
    workers = () if rehearse else ("-n", "12")
    native = (
        ("FASTEDIT_CUDA", "ON"),
        ("FASTEDIT_CUDA_ARCHITECTURES", architecture()),
        ("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count())),
    )
    speed = ("--seconds", "2" if rehearse else "55")
    ncu = (
        "ncu",
        "--csv",
        "--clock-control",
        "none",
        "--target-processes",
        "all",
        "--kernel-name",
        KERNELS,
        "--metrics",
        METRICS,
    )
    quick = ("--quick",) if rehearse else ()
    yield Step("build", 120, (*build, str(ROOT)), environment=native)
    yield Step("check", 35, (*module, "bench.gpu.check", "--out", out, *quick))
    yield Step("speed", 75, (*module, "bench.gpu.speed", "--out", out, *speed))
    yield Step("profile", 75, (*ncu, *module, "bench.gpu.speed", "--once"), needs="ncu", into="gpu-ncu.csv")
    yield Step("tests", 100, (*pytest, *workers, "-k", "cuda or not triton"))
    yield Step("decode", 45, (*module, "bench.gpu.decode", "--out", out))
    if not rehearse:  # Triton compiles for a GPU that is there, or interprets for minutes
        yield Step("triton", 45, (*module, "bench.gpu.check", "--out", out, "--backend", "triton", "--quick"))
        yield Step("switches", 55, (*module, "bench.gpu.switches", "--out", out), needs="nvcc")
        yield Step("bits", 45, (*module, "bench.gpu.bits"), needs="nvcc")


def more_steps(options):
    python, out, rehearse = options.python, str(options.out), options.rehearse
    module = (python, "-m")
    for tool in ("memcheck", "racecheck"):
        sanitizer = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "3", "--target-processes", "all")
        yield Step(tool, 120, (*sanitizer, *module, "bench.gpu.sanitize"), needs="compute-sanitizer")
    if rehearse:
        return
    yield Step("tensor", 150, (*module, "bench.gpu.switches", "--out", out, "--more"), needs="nvcc")
    yield Step("peers", 240, (*module, "bench.kernels", "--out", out, "--minutes", "3"))
    yield Step("bank", 120, (*module, "bench.bank", "--out", out))
    yield Step("models", 240, (*module, "bench.models", "--out", out, "--minutes", "3", "--processes", "2", "--csv"))


def environment(options, step):
    """build/gpu before the checkout, and no current folder: else `python -m` imports sources without a native module."""
    path = [str(ROOT)] if options.rehearse else [str(ROOT / "build/gpu"), str(ROOT)]
    inherited = [p for p in [os.environ.get("PYTHONPATH")] if p]
    made = os.environ | {
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(path + inherited),
    }
    if options.rehearse:
        made["FASTEDIT_GPU_REHEARSAL"] = "1"
    if options.pybind11:
        folder = str(pathlib.Path(options.pybind11).resolve())
        made |= {"pybind11_ROOT": folder, "CPLUS_INCLUDE_PATH": os.pathsep.join([folder, f"{folder}/include"])}
    return made | dict(step.environment)


def run(step, options, log):
    """(status, last line): the step's group of processes is ended with its time."""
    if step.needs and shutil.which(step.needs) is None:
        return "left out", f"{step.needs} is not here"
    target = open(options.out / step.into, "w") if step.into else log  # noqa: SIM115
    at = log.tell()
    child = subprocess.Popen(
        step.command, cwd=ROOT, env=environment(options, step), stdout=target, stderr=log, start_new_session=True
    )
    try:
        code = child.wait(timeout=step.seconds * (4 if options.rehearse else 1))  # limits are for a GPU
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        code = None
    finally:
        if step.into:
            target.close()
    log.seek(at)
    lines = [line for line in log.read().splitlines() if line.strip()]
    return "time over" if code is None else "ok" if code == 0 else f"failed ({code})", lines[-1][:160] if lines else ""


def run_all(options):
    options.out.mkdir(parents=True, exist_ok=True)
    name = "gpu-more" if options.more else "gpu"
    listed = [s for s in (more_steps if options.more else steps)(options) if not options.step or s.name in options.step]
    failed = 0
    with (
        open(options.out / f"{name}.log", "w+") as log,
        open(options.out / f"{name}-steps.csv", "w", newline="") as file,
    ):
        table = csv.writer(file)
        table.writerow(("step", "status", "seconds", "limit", "last line"))
        for step in listed:
            log.seek(0, os.SEEK_END)
            print(f"=== {step.name}: {' '.join(step.command)}", file=log, flush=True)
            begin = time.monotonic()
            try:
                status, last = run(step, options, log)
            except OSError as error:  # a program that cannot be started
                status, last = "failed", str(error)
            seconds = f"{time.monotonic() - begin:.1f}"
            failed += status not in ("ok", "left out")
            table.writerow((step.name, status, seconds, step.seconds, last))
            file.flush()
            print(f"{step.name:<10}{status:<12}{seconds:>7} of {step.seconds} s   {last}", flush=True)
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("bench/results"))
    parser.add_argument("--more", action="store_true", help="sanitizers, peers, a bank, models")
    parser.add_argument("--step", action="append", help="only this one; may be repeated")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, small")
    parser.add_argument("--pybind11", help="a folder with pybind11's headers, for the build")
    parser.add_argument("--python", default=sys.executable)
    options = parser.parse_args()
    options.out = options.out.resolve()
    failed = run_all(options)
    print(f"{failed} steps failed; the log: {options.out}" if failed else f"no step failed; results: {options.out}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
