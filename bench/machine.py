"""Where and of what a figure is: columns of every CSV."""

import pathlib
import platform
import subprocess

import torch


def machine():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    from fastedit import _native

    return f"{platform.machine()} {_native.instruction_set()} {torch.get_num_threads()} threads"


def commit():
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True,
            cwd=pathlib.Path(__file__).parent,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def about():
    return {"machine": machine(), "torch": torch.__version__, "commit": commit()}
