"""Every prefix of a save's system calls, with and without a loss of power, loads as the old or the new (tools/traced.py)."""

import shutil

import pytest

from tools.crashes import KINDS
from tools.traced import Disk, check


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("kind", ["edit", "directions"])
def test_each_prefix_of_a_save(kind):
    calls, states, wrong = check(kind)
    assert not wrong and calls > 5 and states >= 3
    assert set(KINDS) >= {"edit", "directions", "rows", "trajectories"}


def hexed(path):
    return '"' + "".join(f"\\x{byte:02x}" for byte in str(path).encode()) + '"'


def save(folder, synced):
    """The calls of a save by a temporary file and a rename, with or without its fsyncs."""
    old, new = folder / "a", folder / ".a.tmp"
    yield "openat", f"AT_FDCWD<{folder}>, {hexed(new)}, O_WRONLY|O_CREAT|O_EXCL, 0666", 3
    yield "write", f"3<{new}>, {hexed('new')}, 3", 3
    if synced:
        yield "fsync", f"3<{new}>", 0
    yield "rename", f"{hexed(new)}, {hexed(old)}", 0
    yield "openat", f"AT_FDCWD<{folder}>, {hexed(folder)}, O_RDONLY", 4
    yield "fsync", f"4<{folder}>", 0


@pytest.mark.parametrize("synced", [True, False])
def test_a_save_without_fsync_would_be_found(tmp_path, synced):
    (tmp_path / "a").write_text("old")
    disk, seen = Disk(tmp_path), set()
    for call in save(tmp_path, synced):
        disk.apply(*call)
        seen |= {state.get(str(tmp_path / "a")) for state in disk.states()}
    assert seen == ({b"old", b"new"} if synced else {b"old", b"new", b""})
    assert {state[str(tmp_path / "a")] for state in disk.states()} == ({b"new"} if synced else {b"new", b""})
