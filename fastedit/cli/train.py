"""`fastedit train`: by method and task. Each has a file of its own and its own DEFAULTS."""

import contextlib
import importlib

import typer

from .loading import need

EDITS = ("red", "red+", "loreft", "direft", "noreft", "vector")
OTHERS = ("rahf", "recontrol")  # methods with a task of their own
TASKS = {"classify": "sentences", "pairs": "sentences", "regress": "sentences", "sft": "responses", "preference": "responses",
         "reward": "rewards"}  # fmt: skip


def run(model, data, out, method, task, given):
    """Train by a method on a task. given: {option: value}, None for the default."""
    if method not in (*EDITS, *OTHERS):
        raise typer.BadParameter(f"method is {method!r}, expected one of {', '.join((*EDITS, *OTHERS))}")
    if method in OTHERS:
        if task is not None:
            raise typer.BadParameter(f"--method {method} is a task of its own: leave out --task {task}")
        if method == "rahf":
            by_lora = "lora" in (given.get("student") or "lora", given.get("teacher"))
            need("fastedit train --method rahf", "accelerate", *["peft"] * by_lora)
        module = importlib.import_module(f".train_{method}", __package__)
        return module.run(model, data, out, **_options(f"--method {method}", module.DEFAULTS, given))
    task = task or "classify"
    if task not in TASKS:
        raise typer.BadParameter(f"task is {task!r}, expected one of {', '.join(TASKS)}")
    if given.get("rank") is not None and method in ("red", "red+", "vector"):
        raise typer.BadParameter(f"--rank is of low-rank edits, and {method} has none")
    need("fastedit train", "accelerate")
    module = importlib.import_module(f".train_{TASKS[task]}", __package__)
    with readable():
        return module.run(model, data, out, method, task, **_options(f"--task {task}", module.defaults(task), given))


def _options(what, defaults, given):
    said = {name: value for name, value in given.items() if value is not None}
    for name in said:
        if name not in defaults:
            taken = ", ".join(_flag(known) for known in defaults)
            raise typer.BadParameter(f"{_flag(name)} is not an option of {what}, which takes {taken}")
    return {name: int(v) if name == "epochs" and float(v).is_integer() else v for name, v in (defaults | said).items()}


def _flag(name):
    return "--eval" if name == "evaluate" else f"--{name.replace('_', '-')}"


def edits_of(method, *, rank, seed, layers=None, positions=None, site=None):
    """The edit, or the list of them, that a method trains."""
    import torch

    import fastedit

    from .texts import layer_numbers

    where = {"layers": layer_numbers(layers), "positions": positions, "site": site}
    where = {name: value for name, value in where.items() if value is not None}
    torch.manual_seed(seed)
    if method == "red+":
        if site is not None:
            raise ValueError("red+ acts on q, k, v, attn and mlp: leave out --site, or use --method red")
        return fastedit.REDPlus(**where)
    if method == "red":
        return fastedit.RED(**where)
    if method == "vector":
        return fastedit.ScaleBias(scale=False, **({"site": "block"} | where))
    return {"loreft": fastedit.LoReFT, "direft": fastedit.DiReFT, "noreft": fastedit.NoReFT}[method](
        rank, seed=seed, **where
    )


@contextlib.contextmanager
def readable():
    """Mistakes in data and options as one line, not a traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
