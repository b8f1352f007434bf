"""Programs of two processes, for tests."""

import os
import pathlib
import socket
import subprocess
import sys

HERE = pathlib.Path(__file__).parent


def launched(arguments, **environment):
    """A module of Python run as a program, in two processes by its own doing: what subprocess.run returns."""
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    return subprocess.run(
        [sys.executable, "-m", *arguments], env=environment, capture_output=True, text=True, timeout=200
    )


def accelerated(*program):
    """A program under accelerate launch, in two processes on the CPU (without --multi_gpu it would start one)."""
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", _free_port()]  # fmt: skip
    return launched([*launcher, *map(str, program)], ACCELERATE_USE_CPU="true")


def _free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return str(one.getsockname()[1])
