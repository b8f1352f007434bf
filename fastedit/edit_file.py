"""The files of one edit: written so that a crash leaves the old or the new, read so that nothing is trusted.

    folder/edit.safetensors   every tensor, fp32
    folder/edit.json          what it is, its base, and the sha256 of the tensors it belongs to

Replacing edit.json is the commit. `write` puts the tensors under edit-<sha256>.safetensors first, replaces
edit.json, then renames the tensors to edit.safetensors; a writer killed before the last step leaves them
under the first name, where `read` also looks. Each step is synced before the next, and writers of one folder
take turns (flock).
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes

try:
    import fcntl
except ImportError:  # Windows: concurrent writers of one folder are the caller's business there
    fcntl = None

VERSION = 1
JSON, TENSORS = "edit.json", "edit.safetensors"
MAX_JSON_BYTES = 16 << 20
_STAGED = re.compile(r"edit-[0-9a-f]{64}\.safetensors|\.edit-[0-9a-f]{16}\.tmp")
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS}


class EditFileError(ValueError):
    """An edit on disk is not what it should be: says what was expected, what was found and what to do."""


def write(folder, header, tensors):
    """Save `tensors` (name -> fp32 tensor) and the JSON-able `header` as the folder's edit.

    OSError if it cannot be written (full disk, no permission): whatever edit was there is still there.
    """
    folder = Path(folder)
    payload = to_bytes(
        {name: t.detach().to("cpu", torch.float32).contiguous() for name, t in tensors.items()}
    )
    digest = hashlib.sha256(payload).hexdigest()
    record = {"sha256": digest, "bytes": len(payload), "parameters": sum(t.numel() for t in tensors.values())}
    document = {"format": "fastedit", "version": VERSION, **header, "tensors": record}
    text = json.dumps(document, indent=2, allow_nan=False).encode() + b"\n"
    try:
        _make_folder(folder)
        with _turn(folder):
            _commit(folder, digest, payload, text)
    except OSError as error:
        reason = f"could not save the edit in {folder}: {error.strerror or error}"
        raise type(error)(error.errno, reason + "; one saved there before is intact") from error


def _commit(folder, digest, payload, text):
    staged = folder / _staged_name(digest)
    try:
        replace(staged, payload)
        replace(folder / JSON, text)
    except BaseException:
        with contextlib.suppress(OSError):  # what still names it, if anything, is the edit now in force
            if _promised(folder) != digest:
                staged.unlink()
        raise
    with contextlib.suppress(OSError):  # saved already: read() finds the tensors under either name
        os.replace(staged, folder / TENSORS)
        _sync(folder)
        for leftover in folder.iterdir():
            if _STAGED.fullmatch(leftover.name):
                leftover.unlink()


def _staged_name(digest):
    return f"edit-{digest}.safetensors"


def _make_folder(folder):
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{folder} is a file, expected a folder")
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        _sync(folder.parent)


def replace(path, content):
    """Put `content` at `path` in one step that survives a crash: temporary file, fsync, rename, fsync."""
    temporary = path.parent / f".edit-{secrets.token_hex(8)}.tmp"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync(path.parent)


def _sync(folder):
    if os.name == "nt":  # directories cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _turn(folder):
    """One writer at a time; the lock goes with the process, also when that is killed."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(descriptor)


def _promised(folder):
    """The sha256 that the folder's edit.json names, or None."""
    try:
        return json.loads((folder / JSON).read_bytes())["tensors"]["sha256"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def read(folder):
    """(the parsed edit.json, name -> fp32 tensor), both checked; EditFileError with the reason otherwise."""
    folder = Path(folder)
    while True:
        text = _read_json(folder)
        header = _check_header(folder, text)
        payload, found = _payload(folder, header["tensors"])
        if payload is not None:
            return header, _tensors(folder / TENSORS, payload)
        if _read_json(folder) == text:  # else a writer came between the two reads: look again
            raise EditFileError(found)


def _read_json(folder):
    path = folder / JSON
    if not folder.is_dir():
        raise EditFileError(
            f"{folder} is not a folder; expected one with {JSON} and {TENSORS} (handle.save writes it)"
        )
    if not path.is_file():
        there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise EditFileError(
            f"{folder} has no {JSON} (found {there}); expected a folder written by handle.save"
        )
    if path.stat().st_size > MAX_JSON_BYTES:
        raise EditFileError(f"{path} is {path.stat().st_size:,} bytes, expected at most {MAX_JSON_BYTES:,}")
    return path.read_bytes()


def _check_header(folder, text):
    path = folder / JSON
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EditFileError(f"{path} is not valid JSON ({error}); save the edit again") from None
    if not isinstance(header, dict) or header.get("format") != "fastedit":
        raise EditFileError(
            f'{path} is not an edit: expected "format": "fastedit"; fastedit.interop has importers'
        )
    if header.get("version") != VERSION:
        raise EditFileError(
            f"{path} has format version {header.get('version')!r}, this fastedit reads version {VERSION}; "
            "load it with the fastedit that wrote it, or upgrade"
        )
    record = header.get("tensors")
    digest = record.get("sha256") if isinstance(record, dict) else None
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise EditFileError(f"{path}: tensors.sha256 is {digest!r}, expected the 64 hex digits of {TENSORS}")
    if not isinstance(header.get("edits"), list) or not all(isinstance(e, dict) for e in header["edits"]):
        raise EditFileError(f'{path}: "edits" is {header.get("edits")!r:.80}, expected a list of objects')
    return header


def _payload(folder, record):
    """(the bytes whose sha256 edit.json names, None), or (None, what was found instead)."""
    found = f"{folder} has no {TENSORS}; both files belong to an edit: copy the folder again"
    for name in (TENSORS, _staged_name(record["sha256"]), TENSORS):  # the last: renamed between the looks
        path = folder / name
        try:
            size = path.stat().st_size
            if size != record.get("bytes"):
                found = (
                    f"{path} is {size:,} bytes, {JSON} says {record.get('bytes')}: truncated, or of another"
                )
                continue
            payload = path.read_bytes()
        except FileNotFoundError:
            continue
        if hashlib.sha256(payload).hexdigest() == record["sha256"]:
            return payload, None
        found = (
            f"{path} does not have the checksum in {JSON}: changed or damaged; copy or save the edit again"
        )
    return None, found


def _tensors(path, payload):
    for name, entry in _stored_header(path, payload).items():
        if entry.get("dtype") != "F32":
            raise EditFileError(
                f"{path}: tensor {name!r} is {entry.get('dtype')}, expected F32 (edits are fp32)"
            )
    try:
        tensors = from_bytes(payload)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise EditFileError(f"{path} is not a valid safetensors file: {error}") from None
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise EditFileError(
                f"{path}: tensor {name!r} has {bad} of {tensor.numel()} values that are not finite"
            )
    return tensors


def _stored_header(path, payload):
    """The safetensors header, checked to lie inside the file before anything is allocated for it."""
    length = int.from_bytes(payload[:8], "little")
    if len(payload) < 8 or length > len(payload) - 8:
        raise EditFileError(f"{path} announces a header of {length:,} bytes in a file of {len(payload):,}")
    try:
        stored = json.loads(payload[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise EditFileError(f"{path} has a header that is not JSON ({error})") from None
    if not isinstance(stored, dict) or not all(isinstance(entry, dict) for entry in stored.values()):
        raise EditFileError(f"{path} has a header that is not a table of tensors")
    stored.pop("__metadata__", None)
    return stored
