"""A fault at each step of each kind of save, beside a second writer: an OSError or a save, and one whole state afterwards.

The kinds and what they write are tools/crashes.py's; test_store_files.py does this for edits alone, without the second writer.
"""

import errno
import os
import signal

import pytest

from fastedit.files import edit_file
from tools.crashes import MAY_BE_NOTHING, NOTHING, SAVED, _child

STEPS = ("open", "write", "fsync", "replace", "close", "unlink")


def failing(monkeypatch, number):
    """The number-th system call that edit_file makes fails with a full disk; a close closes all the same. The calls so far."""
    made = []

    def counted(step, real):
        def call(*args, **kwargs):
            made.append(step)
            if len(made) != number:
                return real(*args, **kwargs)
            if step == "close":
                real(*args, **kwargs)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return call

    for step in STEPS:
        monkeypatch.setattr(edit_file.os, step, counted(step, getattr(os, step)))
    return made


@pytest.mark.parametrize("kind", SAVED)
def test_a_fault_at_each_step_beside_a_second_writer(kind, tmp_path):
    write, read = SAVED[kind]
    failed, number, (begun, begin) = 0, 0, os.pipe()
    write(tmp_path, 1.0)
    while True:
        number += 1
        beside = number % 2 and _child(write, tmp_path, 3.0, begin)
        try:
            if beside:
                os.read(begun, 1)
            with pytest.MonkeyPatch.context() as patch:
                made, saved = failing(patch, number), True
                try:
                    write(tmp_path, 2.0)
                except OSError as error:
                    assert error.errno == errno.ENOSPC
                    failed, saved = failed + 1, False
        finally:
            if beside:
                os.kill(beside, signal.SIGKILL)
                assert os.waitpid(beside, 0)[1] == signal.SIGKILL, "the second writer failed"
        found = read(tmp_path)
        between = {NOTHING} if kind in MAY_BE_NOTHING and (beside or not saved) else set()
        assert len(found) == 1 and found <= between | ({1.0, 2.0, 3.0} if beside else {2.0} if saved else {1.0, 2.0})
        write(tmp_path, 1.0)
        assert read(tmp_path) == {1.0}
        if len(made) < number:
            break  # a save has fewer steps than this
    os.close(begun), os.close(begin)
    assert failed > 4 and not [name for name in os.listdir(tmp_path) if name.startswith(".edit-")]
