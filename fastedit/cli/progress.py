"""What a command shows while it works: a progress bar for anything that Trainer trains, pictures where they can be drawn."""

import warnings
from contextlib import contextmanager

from huggingface_hub.utils import logging as hub
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback
from transformers.utils import logging


def quiet():
    """Leave the terminal to the bars: no bar for every weight that transformers loads, no advice, no line for each retry."""
    warnings.simplefilter("ignore", FutureWarning)  # PEFT calls what transformers has deprecated
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub.set_verbosity_error()


@contextmanager
def pictures(console):
    """What draws a picture at the end of a command; without matplotlib it is left out, and that is said."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        console.print("no picture: it needs matplotlib (pip install matplotlib)", markup=False)


@contextmanager
def bars(console):
    """A Progress of several bars, which disappears on exit."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        yield progress


class TrainingBar(TrainerCallback):
    """One bar, in steps."""

    def __init__(self, progress, name):
        self.progress = progress
        self.task = progress.add_task(name, total=None)

    def on_train_begin(self, args, state, control, **_):
        self.progress.update(self.task, total=state.max_steps)

    def on_step_end(self, args, state, control, **_):
        self.progress.update(self.task, completed=state.global_step)

    def on_train_end(self, args, state, control, **_):
        self.progress.update(self.task, completed=state.max_steps)
