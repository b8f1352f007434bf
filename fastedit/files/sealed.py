"""Checksums over every byte of a file, kept in the file itself, and reading that trusts nothing.

A seal is the sha256 of the file with the seal's own 64 digits as zeros. In a JSON document it is the first key, in a
safetensors file it is in the metadata: {"sha256": seal, "version": "2", …}. A file with a seal is refused if any of its
bytes has changed. A file of version 1 has no seal.
"""

import hashlib
import json
import mmap
import os
import re
import stat

ZEROS = "0" * 64
VERSION = 2
MAX_HEADER = 100 << 20  # what safetensors itself takes
_JSON_SEAL = re.compile(rb'\{\n  "sha256": "([0-9a-f]{64})"')
_SEAL = re.compile(rb'"sha256":"([0-9a-f]{64})"')


class Damaged(ValueError):
    """What is wrong with a file, without its name. Each reader makes its own error of it."""


def open_regular(path, most):
    """Open a regular file of at most `most` bytes to read: no pipe, device or folder, and no link to one.

    Raises:
        Damaged: it is something else, or larger. OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    file = os.fdopen(descriptor, "rb") if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
    if file is None:
        os.close(descriptor)
        raise Damaged("is not a regular file")
    size = os.fstat(descriptor).st_size
    if most is not None and size > most:
        file.close()
        raise Damaged(f"is {size:,} bytes, expected at most {most:,}")
    return file


def read_regular(path, most):
    """The bytes of a regular file of at most `most` bytes.

    Raises:
        Damaged: as `open_regular`, or it changed while it was read. OSError: it cannot be opened or read.
    """
    with open_regular(path, most) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(size + 1)
    if len(content) != size:
        raise Damaged("changed while it was read")
    return content


def parse_json(text):
    """A JSON document.

    Raises:
        Damaged: it is not one, or holds text that cannot be printed.
    """
    try:
        parsed = json.loads(text)
        json.dumps(parsed, ensure_ascii=False).encode()  # half a surrogate pair is valid JSON, and no text
    except (ValueError, RecursionError) as error:
        raise Damaged(f"is not valid JSON ({error})") from None
    return parsed


def seal_json(document, finite=True):
    """The bytes of a JSON-able dict, with its seal. ValueError and TypeError as json.dumps raises them.

    finite: whether NaN and infinities are refused.
    """
    text = json.dumps({"sha256": ZEROS, **document}, indent=2, allow_nan=not finite).encode() + b"\n"
    return _sealed(text, _JSON_SEAL.match(text))


def check_json(text, parsed):
    """Check that a document of version 2 is as it was written. Damaged says what to do about one that is not."""
    _check(text, _JSON_SEAL.match(text))
    parsed.pop("sha256")


def open_json(text, keys):
    """(document, version) of a JSON object with exactly `keys`, their version and their seal; of version 1 with `keys` alone.

    Raises:
        Damaged: it is not one, was changed, or has other keys.
    """
    parsed = parse_json(text)
    found = sorted(parsed) if isinstance(parsed, dict) else type(parsed).__name__
    if found == sorted(keys):
        return parsed, 1
    if found != sorted({*keys, "version", "sha256"}):
        raise Damaged(f"holds {found!r:.200}, expected {sorted(keys)}, a version and a checksum: changed, or of something else")
    check_json(text, parsed)
    version = parsed.pop("version")
    if version != VERSION:
        raise Damaged(f"has format version {version!r:.40}, this fastedit reads 1 and {VERSION}: upgrade it")
    return parsed, VERSION


def seal_tensors(tensors, note):
    """The bytes of a safetensors file with metadata `note` {name: str}, version and seal."""
    from safetensors.torch import save

    payload = save(tensors, {**note, "version": str(VERSION), "sha256": ZEROS})
    return _sealed(payload, _find(payload))


def open_tensors(payload, keys):
    """(metadata, {name: tensor}, version) of a safetensors file whose metadata has exactly `keys` and their seal.

    Raises:
        Damaged: it is not one, was changed, or has other metadata.
    """
    note, version = _note(payload, keys)
    return note, plain_tensors(payload), version


def plain_tensors(payload):
    """{name: tensor} of a safetensors file, whatever its metadata, which is not looked at.

    Raises:
        Damaged: it is not one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    stored_header(payload)
    try:
        return load(payload)
    except (SafetensorError, ValueError, RuntimeError, LookupError, TypeError, OverflowError) as error:
        raise Damaged(f"is not a valid safetensors file: {error}") from None


def check_mapped(path, keys):
    """(metadata, version) of a safetensors file too large to hold in memory twice, checked as `open_tensors` does.

    Raises:
        Damaged: as there. OSError: it cannot be opened.
    """
    with open_regular(path, None) as file:
        if not os.fstat(file.fileno()).st_size:
            raise Damaged("is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as payload:
            return _note(payload, keys)


def _note(payload, keys):
    note = stored_header(payload).pop("__metadata__", {})
    sealed = {*keys, "version", "sha256"}
    if set(note) == sealed:
        if note["version"] != str(VERSION):
            raise Damaged(f"has format version {note['version']!r}, this fastedit reads 1 and {VERSION}: upgrade it")
        _check(payload, _find(payload))
    elif set(note) != set(keys):
        raise Damaged(f"has the metadata {sorted(note)[:5]!r:.200}, expected {sorted(sealed)}: changed, or of something else")
    return note, VERSION if set(note) == sealed else 1


def stored_header(payload):
    """The safetensors header, after a check that it is inside the file, before anything is allocated for it.

    Raises:
        Damaged: it is not one.
    """
    length = int.from_bytes(payload[:8], "little")
    if len(payload) < 8 or length > min(len(payload) - 8, MAX_HEADER):
        raise Damaged(f"announces a header of {length:,} bytes in a file of {len(payload):,}")
    try:
        header = json.loads(bytes(payload[8 : 8 + length]))
    except (ValueError, RecursionError) as error:
        raise Damaged(f"has a header that is not JSON ({error})") from None
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise Damaged("has a header that is not a table of tensors")
    note = header.get("__metadata__", {})
    if not all(isinstance(value, str) for value in note.values()):
        raise Damaged("has metadata that is not text")
    return header


def _find(payload):
    length = int.from_bytes(payload[:8], "little")
    return _SEAL.search(payload, 8, 8 + length)


def _digest(content, found):
    start, end = found.span(1)
    with memoryview(content) as view:
        digest = hashlib.sha256(view[:start])
        digest.update(ZEROS.encode())
        digest.update(view[end:])
    return digest.hexdigest().encode()


def _sealed(content, found):
    return content[: found.start(1)] + _digest(content, found) + content[found.end(1) :]


def _check(content, found):
    if found is None:
        raise Damaged("has no checksum of its own where one is expected: changed or damaged")
    if _digest(content, found) != found[1]:
        raise Damaged("does not have the checksum that it names: changed or damaged")
