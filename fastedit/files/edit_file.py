"""The files of one edit: a crash leaves the old edit or the new one, and a reader trusts nothing.

    folder/edit.safetensors   every tensor, fp32
    folder/edit.json          what it is, its base, the sha256 of the tensors it belongs to, and its own
    folder/head.safetensors   what trained beside the edit (patching/trained_beside.py); `training` names its sha256

Replacing edit.json is the commit. `write` first puts the tensors under edit-<sha256>.safetensors and the head under
head-<sha256>.safetensors, then replaces edit.json, then gives both their own names. A writer killed before the last step
leaves them under the first names, where readers also look. Each step is synced before the next. Writers of one folder take
turns (flock).
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import stat
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes

from .sealed import VERSION, Damaged, check_json, parse_json, read_regular, seal_json, stored_header

try:
    import fcntl
except ImportError:  # Windows: concurrent writers of one folder are the caller's business there
    fcntl = None

JSON, TENSORS, HEAD = "edit.json", "edit.safetensors", "head.safetensors"
MAX_JSON_BYTES, MAX_TENSOR_BYTES = 16 << 20, 4 << 30
_KEYS = {"fastedit", "edits", "strength", "base", "training"}  # of a header; `write` adds format, version, tensors, sha256
_RECORD = {"sha256", "bytes", "parameters"}
_STAGED = re.compile(r"(?:edit|head)-([0-9a-f]{64})\.safetensors|\.edit-[0-9a-f]{16}\.tmp")
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS}


logger = logging.getLogger("fastedit")


class EditFileError(ValueError):
    """An edit on disk is not what it should be. The message says what was expected, what was found and what to do."""


def write(folder, header, tensors, head=None):
    """Save `tensors` (name -> fp32 tensor) and the JSON-able `header` as the folder's edit.

    header: with the keys fastedit, edits, strength, base, training. Other keys that `read` returns are made again.
    head: the bytes of head.safetensors, whose sha256 is training's "head". One that is there and not named any more goes.

    OSError if it cannot be written (full disk, no permission). The edit that was there is then still there.
    """
    folder = Path(folder)
    unknown = sorted(set(header) - _KEYS - {"format", "version", "tensors"})
    if unknown:
        raise ValueError(f"an edit's header has the key {unknown[0]!r}, expected some of {', '.join(sorted(_KEYS))}")
    payload = to_bytes(
        {name: t.detach().to("cpu", torch.float32).contiguous() for name, t in tensors.items()}
    )
    digest = hashlib.sha256(payload).hexdigest()
    record = {"sha256": digest, "bytes": len(payload), "parameters": sum(t.numel() for t in tensors.values())}
    said = {key: value for key, value in header.items() if key in _KEYS}
    document = {"format": "fastedit", "version": VERSION, **said, "tensors": record}
    text = seal_json(document)
    files = {TENSORS: (digest, payload)} | ({} if head is None else {HEAD: (named(document)[1], head)})
    with _saving(folder):
        _make_folder(folder)
        with turn(folder):
            _commit(folder, files, text, named(document))


@contextlib.contextmanager
def _saving(folder):
    try:
        yield
    except OSError as error:
        reason = f"could not save the edit in {folder}: {error.strerror or error}"
        raise type(error)(error.errno, reason + "; one saved there before is intact") from error


def reseal(folder):
    """Give an edit.json that was changed by hand its checksum again. The tensors must be those it names.

    Returns the parsed document. Raises EditFileError if it is not an edit otherwise, OSError as `write`.
    """
    folder = Path(folder)
    _read_json(folder)
    with _saving(folder), turn(folder):  # what it reads is what it replaces: not the edit of before another writer's turn
        document = _parse(folder, _read_json(folder))
        document.pop("sha256", None)
        document["version"] = VERSION
        try:
            sealed = seal_json(document)
        except ValueError as error:
            raise EditFileError(f"{folder / JSON} holds numbers that are NaN or infinite ({error}): not sealed") from None
        header = _check_header(folder, sealed)
        payload, found = _payload(folder, header["tensors"])
        if payload is None:
            raise EditFileError(found)
        _tensors(folder / TENSORS, payload)
        replace(folder / JSON, sealed, kind="edit")
    return header


def _commit(folder, files, text, wanted):
    """files: {name: (sha256, bytes)}. text: of edit.json, which names `wanted`, the sha256 of the tensors and of the head."""
    staged = {name: folder / staged_name(name, digest) for name, (digest, _) in files.items()}
    try:
        for name, (_, payload) in files.items():
            private = folder / name if (folder / name).exists() else folder / TENSORS
            replace(staged[name], payload, like=private, kind="edit")
        replace(folder / JSON, text, kind="edit")
    except BaseException:
        with contextlib.suppress(OSError):  # what still names them, if anything, is the edit now in force
            still = promised(folder)
            for name, (digest, _) in files.items():
                if digest not in still:
                    staged[name].unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # saved already: readers find them under either name
        for name, path in staged.items():
            os.replace(path, folder / name)
        if wanted[1] is None:
            (folder / HEAD).unlink(missing_ok=True)
        _sync(folder)
        for leftover in folder.iterdir():
            found = _STAGED.fullmatch(leftover.name)
            if found and (found[1] is None or found[1] not in wanted):
                leftover.unlink()


def staged_name(name, digest):
    """Of edit.safetensors or head.safetensors before edit.json names it."""
    return f"{name.partition('.')[0]}-{digest}.safetensors"


def named(document):
    """(sha256 of the tensors, of the head or None) that an edit.json names."""
    training = document.get("training")
    head = training.get("head") if isinstance(training, dict) else None
    return document["tensors"]["sha256"], head


def _make_folder(folder):
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{folder} is a file, expected a folder")
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        _sync(folder.parent)


def replace(path, content, like=None, kind="part"):
    """Put `content` at `path` in one step that survives a crash: temporary file, fsync, rename, fsync.

    The file has the permissions of the old one, or of the file `like`: a private file stays private. Temporary files of
    the kind "edit" are made in a turn alone: the next writer of an edit there removes what a crash left of them.
    """
    temporary = _stage(path, content, like, kind)
    try:
        os.replace(temporary, path)
    except BaseException:
        _discard(temporary)
        raise
    _sync(path.parent)


def replace_all(folder, files, last):
    """Put `files` {name: bytes} into a folder of which a reader needs them all, and nothing without the one named `last`.

    For formats whose readers know no checksums. All are written beside the old ones first. Where more than one of them differs
    from what is there, `last` is then removed, the others are put in place, and it is the last one: a crash within these
    renames leaves a folder that every reader refuses, never some of the old files beside some of the new.
    """
    folder, staged = Path(folder), {}
    _make_folder(folder)
    with turn(folder):
        changed = [name for name, content in files.items() if not _holds(folder / name, content)]
        renewed = changed if len(changed) < 2 else [*(name for name in changed if name != last), last]
        try:
            for name in renewed:
                staged[name] = _stage(folder / name, files[name])
            if len(renewed) > 1:
                (folder / last).unlink(missing_ok=True)
                _sync(folder)
            for name in renewed:
                if name == last:
                    _sync(folder)
                os.replace(staged[name], folder / name)
                del staged[name]
        except BaseException:
            for temporary in staged.values():
                _discard(temporary)
            raise
        _sync(folder)


def _holds(path, content):
    try:
        return read_regular(path, len(content)) == content
    except (Damaged, OSError):
        return False


def _discard(temporary):
    with contextlib.suppress(OSError):
        temporary.unlink()


def _stage(path, content, like=None, kind="part"):
    """The path of a temporary file beside `path` that holds `content`, synced."""
    temporary = path.parent / f".{kind}-{secrets.token_hex(8)}.tmp"
    mode = _mode(path if like is None else like)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else mode & 0o600)
        try:
            if mode is not None:
                with contextlib.suppress(OSError):  # a file system without permissions
                    os.chmod(descriptor, mode)
            view = memoryview(content)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except BaseException:
        _discard(temporary)
        raise
    return temporary


def _mode(path):
    try:
        found = os.lstat(path).st_mode
    except OSError:
        return None
    return stat.S_IMODE(found) if stat.S_ISREG(found) else None


def _sync(folder):
    if os.name == "nt":  # directories cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def turn(folder):
    """One writer at a time. The lock ends with the process, also when that is killed."""
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


def promised(folder):
    """What the folder's edit.json names (`named`). Empty if there is none or it says nothing. OSError: it cannot be read now."""
    try:
        return named(json.loads(read_regular(folder / JSON, MAX_JSON_BYTES)))
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ()


def read(folder, limit=None):
    """(the parsed edit.json, name -> fp32 tensor), both checked. EditFileError with the reason otherwise.

    limit: a function from the parsed edit.json to the most bytes that its tensors may have, checked before they are
        read.
    """
    folder = Path(folder)
    while True:
        text = _read_json(folder)
        header = _check_header(folder, text)
        payload, found = _payload(folder, header["tensors"], MAX_TENSOR_BYTES if limit is None else limit(header))
        if payload is not None:
            return header, _tensors(folder / TENSORS, payload)
        if _read_json(folder) == text:  # else a writer came between the two reads: look again
            raise EditFileError(found)


def _read_json(folder):
    path = folder / JSON
    try:
        if not folder.is_dir():
            raise EditFileError(
                f"{folder} is not a folder; expected one with {JSON} and {TENSORS} (handle.save writes it)"
            )
        if not path.exists():
            there = ", ".join(f"{entry.name!r}" for entry in sorted(folder.iterdir())[:8]) or "nothing"
            raise EditFileError(
                f"{folder} has no {JSON} (found {there}); expected a folder written by handle.save"
            )
        return read_regular(path, MAX_JSON_BYTES)
    except Damaged as error:
        raise EditFileError(f"{path} {error}; save the edit again") from None
    except OSError as error:
        raise EditFileError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        if isinstance(error, EditFileError):
            raise
        raise EditFileError(f"{str(folder)!r} is not the name of a folder: {error}") from None


def _parse(folder, text):
    """The document, in a version that this fastedit knows."""
    path = folder / JSON
    try:
        header = parse_json(text)
    except Damaged as error:
        raise EditFileError(f"{path} {error}; save the edit again") from None
    if not isinstance(header, dict) or header.get("format") != "fastedit":
        raise EditFileError(
            f'{path} is not an edit: expected "format": "fastedit"; fastedit.interop has importers'
        )
    version = header.get("version")
    if isinstance(version, (bool, float)) or version not in (1, VERSION):
        raise EditFileError(
            f"{path} has format version {version!r:.40}, this fastedit reads 1 and {VERSION}; "
            "load it with the fastedit that wrote it, or upgrade"
        )
    return header


def _check_header(folder, text):
    path = folder / JSON
    header = _parse(folder, text)
    if header["version"] == VERSION:
        try:
            check_json(text, header)
        except Damaged as error:
            raise EditFileError(
                f"{path} {error}; where it was changed on purpose: fastedit show --reseal {folder}, else save the edit again"
            ) from None
    record = header.get("tensors")
    known = {"format", "version", "tensors", *_KEYS}
    unknown = sorted(set(header) - known) or (sorted(set(record) - _RECORD) if isinstance(record, dict) else [])
    if unknown:
        raise EditFileError(f"{path} has the key {unknown[0]!r:.60}, which no edit has; expected some of {sorted(known)}")
    digest = record.get("sha256") if isinstance(record, dict) else None
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise EditFileError(f"{path}: tensors.sha256 is {digest!r:.80}, expected the 64 hex digits of {TENSORS}")
    if not isinstance(header.get("edits"), list) or not all(isinstance(e, dict) for e in header["edits"]):
        raise EditFileError(f'{path}: "edits" is {header.get("edits")!r:.80}, expected a list of objects')
    if header["version"] != VERSION:
        logger.warning("fastedit: %s is of format version 1, which has no checksum of its own; save the edit again for one", path)
    return header


def _payload(folder, record, most=MAX_TENSOR_BYTES):
    """(the bytes whose sha256 edit.json names, None), or (None, what was found instead)."""
    found = f"{folder} has no {TENSORS}; both files belong to an edit: copy the folder again"
    for name in (TENSORS, staged_name(TENSORS, record["sha256"]), TENSORS):  # the last: renamed between the looks
        path = folder / name
        try:
            size = path.stat().st_size
            if size != record.get("bytes"):
                found = (
                    f"{path} is {size:,} bytes, {JSON} says {record.get('bytes')!r:.40}: truncated, or of another"
                )
                continue
            payload = read_regular(path, most)
        except FileNotFoundError:
            continue
        except Damaged as error:
            raise EditFileError(f"{path} {error}") from None
        except OSError as error:
            raise EditFileError(f"{path} cannot be read: {error.strerror or error}") from None
        if hashlib.sha256(payload).hexdigest() == record["sha256"]:
            return payload, None
        found = (
            f"{path} does not have the checksum in {JSON}: changed or damaged; copy or save the edit again"
        )
    return None, found


def _tensors(path, payload):
    try:
        stored = stored_header(payload)
    except Damaged as error:
        raise EditFileError(f"{path} {error}") from None
    stored.pop("__metadata__", None)
    for name, entry in stored.items():
        if entry.get("dtype") != "F32":
            raise EditFileError(
                f"{path}: tensor {name!r:.80} is {entry.get('dtype')!s:.40}, expected F32 (edits are fp32)"
            )
    try:
        tensors = from_bytes(payload)
    except (SafetensorError, ValueError, RuntimeError, LookupError, TypeError, OverflowError) as error:
        raise EditFileError(f"{path} is not a valid safetensors file: {error}") from None
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise EditFileError(
                f"{path}: tensor {name!r} has {bad} of {tensor.numel()} values that are not finite"
            )
    return tensors
