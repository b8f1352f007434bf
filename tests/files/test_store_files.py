"""An edit's two files: no crash, full disk or hostile file is ever read as an edit that nobody saved."""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import random
import resource
import signal
import struct
import time

import pytest
import torch

from fastedit.files import edit_file
from fastedit.files.edit_file import EditFileError, read, write
from fastedit.patching import trained_beside


def fork():
    """A child whose torch stays on one thread: the parent's OpenMP team does not come along, and waiting for it hangs."""
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
    return pid

BASE = torch.nn.Linear(1024, 1024)  # of which the heads below may be
STEPS = ("open", "write", "fsync", "replace", "close")


def edit(value, width=64):
    """A distinguishable edit: header, tensors and, of even values, what trained beside it carry `value`."""
    tensors = {
        f"0.layers.{layer}.mlp.{part}": torch.full((width,), float(value))
        for layer in range(2)
        for part in ("scale", "bias")
    }  # fmt: skip
    head, digest = trained_beside.payload({"score": torch.full((width,), value)}) if value % 2 == 0 else (None, None)
    training = {"value": value} | ({} if head is None else {"head": digest})
    return {"edits": [{"kind": "ScaleBias"}], "training": training}, tensors, head


def value_of(folder):
    """Which edit the folder holds; fails on a mixture."""
    header, tensors, head = trained_beside.read(folder, BASE)
    value = header["training"]["value"]
    assert len(tensors) == 4 and len(head) == (value % 2 == 0)
    assert {t.unique().item() for t in (*tensors.values(), *head.values())} == {value}
    return value


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def at_step(monkeypatch, number, action):
    """Call `action` in place of the number-th system call of a save; returns the count of calls made."""
    calls = itertools.count(1)
    made = []

    def counted(step, real):
        def call(*args, **kwargs):
            made.append(step)
            acts = next(calls) == number
            if acts and step != "close":
                action(step)
            result = real(*args, **kwargs)
            if acts and step == "close":  # a failing close has closed all the same
                action(step)
            return result

        return call

    for step in STEPS:
        monkeypatch.setattr(edit_file.os, step, counted(step, getattr(os, step)))
    return made


def in_child(work):
    """The wait status of a forked child that runs `work` and exits."""
    pid = fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def steps_of_a_save(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        made = at_step(patch, -1, None)
        write(tmp_path / "counted", *edit(0))
        write(tmp_path / "counted", *edit(1))
    return len(made)


def test_round_trip_leaves_the_two_documented_files_alone(tmp_path):
    folder = tmp_path / "new" / "edit"
    for value in (1, 2, 2):
        write(folder, *edit(value))
        assert value_of(folder) == value
        assert names(folder) == ["edit.json", "edit.safetensors"] + ["head.safetensors"] * (value == 2)
    _, tensors = read(folder)
    assert all(t.dtype == torch.float32 for t in tensors.values())


def test_tensors_of_any_dtype_and_stride_are_stored_as_fp32(tmp_path):
    half = torch.randn(8, 6).to(torch.bfloat16)
    write(tmp_path, {"edits": []}, {"a": half.t(), "b": half[:, ::2].requires_grad_()})
    _, tensors = read(tmp_path)
    assert torch.equal(tensors["a"], half.t().float()) and torch.equal(tensors["b"], half[:, ::2].float())


@pytest.mark.parametrize("first", [None, 1])
def test_kill_at_every_step_leaves_the_old_edit_or_the_new(tmp_path, first):
    seen = set()
    for number in range(1, steps_of_a_save(tmp_path) + 1):
        folder = tmp_path / f"killed-{first}-{number}"
        if first is not None:
            write(folder, *edit(first))

        def work(number=number, folder=folder):
            with pytest.MonkeyPatch.context() as patch:
                at_step(patch, number, lambda step: os.kill(os.getpid(), signal.SIGKILL))
                write(folder, *edit(2))

        status = in_child(work)
        if status == 0:
            break  # the save has fewer steps than this
        assert os.WTERMSIG(status) == signal.SIGKILL
        if first is None and not (folder / "edit.json").exists():
            seen.add(None)
        else:
            seen.add(value_of(folder))
        write(folder, *edit(3))
        assert value_of(folder) == 3 and names(folder) == ["edit.json", "edit.safetensors"]
    assert seen == {first, 2}


def test_kill_at_random_times_over_large_edits(tmp_path):
    generator = random.Random(0)
    write(tmp_path, *edit(0, 1 << 16))
    started = time.monotonic()
    write(tmp_path, *edit(1, 1 << 16))
    longest, seen = 4 * (time.monotonic() - started), []
    for kill in range(1, 41):
        pid = fork()
        if pid == 0:
            for value in itertools.count(kill * 1000):
                write(tmp_path, *edit(value, 1 << 16))
        time.sleep(generator.uniform(0, longest))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        seen.append(value_of(tmp_path))
        if seen[-2:-1] == seen[-1:]:  # no save got through: the machine has become slower
            longest = min(4, 1.5 * longest)
    assert len(set(seen)) > 5, f"too few saves got through to say anything: {seen}"


def test_a_reader_beside_a_writer_sees_whole_edits_only(tmp_path):
    write(tmp_path, *edit(0))
    pid = fork()
    if pid == 0:
        for value in itertools.count(1):
            write(tmp_path, *edit(value))
    seen, end = [], time.monotonic() + 120
    try:
        while len(seen) < 300 or (len(set(seen)) < 3 and time.monotonic() < end):
            seen.append(value_of(tmp_path))
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert len(set(seen)) > 2


def test_two_writers_of_one_folder_take_turns(tmp_path):
    pids = []
    for writer in range(2):
        pid = fork()
        if pid == 0:
            for value in range(40):
                write(tmp_path, *edit(writer * 100 + value))
            os._exit(0)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    assert value_of(tmp_path) in (39, 139) and names(tmp_path) == ["edit.json", "edit.safetensors"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_failure_at_every_step_is_an_error_and_keeps_a_whole_edit(tmp_path, code):
    errors = 0
    for number in range(1, steps_of_a_save(tmp_path) + 1):
        folder = tmp_path / f"failed-{number}"
        write(folder, *edit(1))

        def fail(step):
            raise OSError(code, os.strerror(code))

        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, number, fail)
            try:
                write(folder, *edit(2))
                saved = True
            except OSError as error:
                assert error.errno == code and "one saved there before is intact" in str(error)
                saved, errors = False, errors + 1
        assert value_of(folder) in ((2,) if saved else (1, 2))
        write(folder, *edit(3))
        assert value_of(folder) == 3 and names(folder) == ["edit.json", "edit.safetensors"]
    assert errors > 5


@pytest.mark.parametrize("value", [2, 3])
def test_a_process_without_descriptors_keeps_a_whole_edit(tmp_path, value):
    """From one step of a save on nothing can be opened any more, edit.json neither: its tensors are not taken for nobody's."""
    real = os.open
    for number in range(1, 12):
        folder, opened = tmp_path / f"{number}", []
        write(folder, *edit(value - 1))

        def refused(*args, number=number, opened=opened, **kwargs):
            opened.append(args)
            if len(opened) >= number:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return real(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "open", refused)
            with contextlib.suppress(OSError):
                write(folder, *edit(value))
        assert value_of(folder) in (value - 1, value)
    assert len(opened) < number, "a save opens more files than this"


@pytest.mark.parametrize("limit", [0, 100, 1000, 1 << 18])
def test_a_disk_that_is_really_full(tmp_path, limit):
    """RLIMIT_FSIZE: the kernel itself cuts the write short and then refuses."""
    write(tmp_path, *edit(1, 1 << 16))

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            write(tmp_path, *edit(2, 1 << 16))
        except OSError as error:
            os._exit(0 if error.errno == errno.EFBIG else 2)
        os._exit(3)

    assert in_child(work) == 0
    assert value_of(tmp_path) == 1 and names(tmp_path) == ["edit.json", "edit.safetensors"]


def test_a_folder_that_cannot_be_made_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file, expected a folder"):
        write(tmp_path / "file", *edit(1))
    with pytest.raises(OSError, match="could not save the edit in"):
        write(tmp_path / "file" / "below", *edit(1))
    assert names(tmp_path) == ["file"]


def replace_json(folder, **changes):
    header = json.loads((folder / "edit.json").read_text())
    del header["sha256"]  # version 1 had none
    header |= {"version": 1, **changes}
    (folder / "edit.json").write_text(json.dumps(header))


def replace_tensors(folder, payload):
    """Put hostile tensors in place with the checksum that they need to be looked at."""
    (folder / "edit.safetensors").write_bytes(payload)
    replace_json(folder, tensors={"sha256": hashlib.sha256(payload).hexdigest(), "bytes": len(payload)})


def safetensors_bytes(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def tensor_file(dtype="F32", shape=(1,), offsets=(0, 4), data=b"\0" * 4, names="a"):
    entry = {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}
    return safetensors_bytes(dict.fromkeys(names, entry), data)


PICKLE = b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94."
INVALID = "not a valid safetensors"
HOSTILE_TENSORS = {
    "empty file": (b"", "announces a header"),
    "five bytes": (b"12345", "announces a header"),
    "pickle": (PICKLE, "announces a header"),
    "huge header": (struct.pack("<Q", 1 << 62) + b"{}", "header of 4,611,686,018,427,387,904 bytes"),
    "header not JSON": (safetensors_bytes(b"\xff\xfe{"), "not JSON"),
    "header deeply nested": (safetensors_bytes(b"[" * 100_000), "not JSON"),
    "header a list": (safetensors_bytes([1]), "not a table"),
    "entry a number": (safetensors_bytes({"a": 3}), "not a table"),
    "bf16": (tensor_file("BF16", (2,)), "is BF16, expected F32"),
    "offsets past the end": (tensor_file(shape=(99,), offsets=(0, 396)), INVALID),
    "negative offsets": (tensor_file(offsets=(-4, 0)), INVALID),
    "shape overflows": (tensor_file(shape=(1 << 62, 1 << 62)), INVALID),
    "overlapping": (tensor_file(names="ab"), INVALID),
    "nan": (
        tensor_file(shape=(2,), offsets=(0, 8), data=struct.pack("<2f", 1, float("nan"))),
        "1 of 2 values",
    ),
    "infinity": (tensor_file(data=struct.pack("<f", float("inf"))), "not finite"),
}


@pytest.mark.parametrize("case", HOSTILE_TENSORS)
def test_hostile_tensors(tmp_path, case):
    payload, message = HOSTILE_TENSORS[case]
    write(tmp_path, *edit(1))
    replace_tensors(tmp_path, payload)
    with pytest.raises(EditFileError, match=message):
        read(tmp_path)


HOSTILE_JSON = {
    "not JSON": (b"{", "not valid JSON"),
    "not text": (b"\xff\xfe\0", "not valid JSON"),
    "deeply nested": (b"[" * 100_000, "not valid JSON"),
    "huge number": (b"1" * 100_000, "not valid JSON"),
    "a list": (b"[]", 'expected "format": "fastedit"'),
    "another format": (b'{"format": "peft"}', 'expected "format": "fastedit"'),
    "a future version": (b'{"format": "fastedit", "version": 3}', "version 3, this fastedit reads 1 and 2"),
    "a version that is true": (b'{"format": "fastedit", "version": true}', "version True, this fastedit reads"),
    "no checksum": (b'{"format": "fastedit", "version": 2}', "has no checksum of its own"),
    "no tensors": (b'{"format": "fastedit", "version": 1}', "sha256 is None"),
    "a path for a checksum": (
        b'{"format": "fastedit", "version": 1, "tensors": {"sha256": "../../etc/passwd"}}',
        "expected the 64 hex digits",
    ),
    "edits a number": (
        b'{"format": "fastedit", "version": 1, "edits": 3, "tensors": {"sha256": "' + b"0" * 64 + b'"}}',
        "expected a list of objects",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE_JSON)
def test_hostile_json(tmp_path, case):
    text, message = HOSTILE_JSON[case]
    write(tmp_path, *edit(1))
    (tmp_path / "edit.json").write_bytes(text)
    with pytest.raises(EditFileError, match=message):
        read(tmp_path)


def test_a_json_too_large_is_not_read(tmp_path):
    write(tmp_path, *edit(1))
    with open(tmp_path / "edit.json", "ab") as file:
        file.truncate(1 << 40)  # sparse: reading it would exhaust the memory
    with pytest.raises(EditFileError, match="expected at most"):
        read(tmp_path)


def test_files_missing_truncated_swapped_or_changed(tmp_path):
    with pytest.raises(EditFileError, match="is not a folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(EditFileError, match=r"has no edit.json \(found nothing\)"):
        read(tmp_path)
    write(tmp_path, *edit(1))
    tensors = tmp_path / "edit.safetensors"
    whole = tensors.read_bytes()

    tensors.write_bytes(whole[:-1])
    with pytest.raises(EditFileError, match="truncated, or of another"):
        read(tmp_path)
    tensors.write_bytes(whole[:-1] + b"\1")
    with pytest.raises(EditFileError, match="does not have the checksum"):
        read(tmp_path)
    tensors.unlink()
    with pytest.raises(EditFileError, match=r"has no edit\.safetensors"):
        read(tmp_path)

    write(tmp_path / "other", *edit(2))  # the same size, another edit's tensors: a mixture
    tensors.write_bytes((tmp_path / "other" / "edit.safetensors").read_bytes())
    with pytest.raises(EditFileError, match="does not have the checksum"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["edit.json", "edit.safetensors"])
def test_only_regular_files_are_read(tmp_path, name):
    """A pipe nobody writes to, and a device without an end, are refused at once."""
    write(tmp_path, *edit(1))
    path = tmp_path / name
    for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path), os.mkdir):
        path.unlink()
        make(path)
        with pytest.raises(EditFileError, match=r"is not a regular file|truncated, or of another"):
            read(tmp_path)
        path.rmdir() if path.is_dir() else path.unlink()
        write(tmp_path, *edit(1))


def test_a_private_edit_stays_private(tmp_path):
    write(tmp_path, *edit(1))
    for name in names(tmp_path):
        os.chmod(tmp_path / name, 0o600)
    write(tmp_path, *edit(2))
    assert value_of(tmp_path) == 2
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in names(tmp_path)] == [0o600] * 3


def test_a_limit_is_looked_at_before_the_tensors_are_read(tmp_path, monkeypatch):
    write(tmp_path, *edit(1))
    monkeypatch.setattr(edit_file, "from_bytes", None)  # would be called
    with pytest.raises(EditFileError, match="expected at most 100"):
        read(tmp_path, lambda header: 100)
