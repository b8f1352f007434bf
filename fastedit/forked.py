"""After a fork, a child runs native code on one thread.

OpenMP's threads stay in the parent, and a child that waits for them hangs. `multiprocessing.Pool` forks on Linux unless
told otherwise. If this process has native threads by then, its children run our kernels, and torch's, on one thread
each. "spawn" children have all of their threads.
"""

import logging
import os
import sys
import threading

_state = {"threads": False, "said": False}


def watch():
    """Watch for forks of this process. Called once; does nothing before there is a fork."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_look, after_in_child=_one_thread)


def _look():
    native = sys.modules.get("fastedit._native")
    try:
        tasks = len(os.listdir("/proc/self/task"))
    except OSError:  # no such table here: taken for granted
        tasks = sys.maxsize
    _state["threads"] = native is not None and tasks > threading.active_count()
    if _state["threads"] and not _state["said"] and not _by_data_loader():
        _state["said"] = True
        logging.getLogger("fastedit").warning(
            "fastedit: this process forks after native threads were started; its children run on one thread each. "
            'multiprocessing.get_context("spawn") gives them theirs'
        )


def _by_data_loader():
    """Whether torch's DataLoader forked: its workers are on one thread anyway."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.data.dataloader":
            return True
        frame = frame.f_back
    return False


def _one_thread():
    if not _state["threads"]:
        return
    sys.modules["fastedit._native"].set_num_threads(1)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
