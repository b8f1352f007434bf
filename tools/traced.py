"""Every state that a crash can leave: a save's system calls are traced, and each prefix of them is a state that must load.

    python -m tools.traced                      needs strace; part of make crashes

Of a prefix there are up to four states on disk: what was written and not synced is there or is lost, and names (new, renamed,
removed) that no fsync of their folder has settled are there or not. Each loads as the old or the new, whole.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from . import table
from .crashes import MAY_BE_NOTHING, NOTHING, SAVED

CALLS = (
    "open,openat,creat,write,pwrite64,writev,ftruncate,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat"
)
_LINE = re.compile(r"(?:\d+ +)?(\w+)\((.*)\) += (-?\d+)(?:<[^>]*>)?$")
_TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
_FD = re.compile(r"^(\d+)<([^>]*)>")


class Disk:
    """Files and names as a process sees them, and as they are on the disk after a loss of power."""

    def __init__(self, folder):
        self.files = {}  # number → [what was written, what is synced]
        self.names, self.settled, self.open = {}, {}, {}
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                self.names[str(path)] = self.settled[str(path)] = self._new(path.read_bytes())

    def _new(self, content=b""):
        self.files[len(self.files)] = [bytearray(content), bytes(content)]
        return len(self.files) - 1

    def apply(self, call, arguments, result):
        texts = [bytes.fromhex(text.replace("\\x", "")) for text in _TEXT.findall(arguments)]
        if call in ("open", "openat", "creat"):
            path = texts[0].decode()
            if path not in self.names and "O_CREAT" in arguments:
                self.names[path] = self._new()
            elif "O_TRUNC" in arguments:
                self.files[self.names[path]][0].clear()
            self.open[result] = [self.names.get(path), 0, path]
        elif call in ("write", "pwrite64", "writev"):
            number, at, path = self.open.get(_fd(arguments), (None, 0, None))
            if number is not None:
                content = b"".join(texts)[:result]
                if call == "pwrite64":
                    at = int(arguments.rsplit(",", 1)[1])
                self.files[number][0][at : at + len(content)] = content
                self.open[_fd(arguments)][1] = at + len(content)
        elif call == "ftruncate":
            number = self.open[_fd(arguments)][0]
            size = int(arguments.rsplit(",", 1)[1])
            content = self.files[number][0]
            content[:] = content[:size].ljust(size, b"\0")
        elif call in ("fsync", "fdatasync"):
            number, _, path = self.open[_fd(arguments)]
            if number is not None:
                self.files[number][1] = bytes(self.files[number][0])
            else:
                self._settle(path)
        elif call.startswith("rename"):
            self.names[texts[1].decode()] = self.names.pop(texts[0].decode())
        elif call.startswith("unlink"):
            self.names.pop(texts[0].decode(), None)

    def _settle(self, folder):
        inside = lambda names: {path for path in names if str(Path(path).parent) == folder}  # noqa: E731
        for path in inside(self.settled) - inside(self.names):
            del self.settled[path]
        self.settled.update({path: self.names[path] for path in inside(self.names)})

    def states(self):
        """{path: content}, each that may be there now."""
        for names in (self.names, self.settled):
            for part in (0, 1):
                yield {path: bytes(self.files[number][part]) for path, number in names.items()}


def _fd(arguments):
    return int(_FD.match(arguments)[1])


def trace(kind, folder):
    """[(call, arguments, result)] of a save over what the folder holds, of files below it alone."""
    script = f"from tools.crashes import SAVED; from pathlib import Path; SAVED[{kind!r}][0](Path({str(folder)!r}), 2.0)"
    with tempfile.NamedTemporaryFile("r") as log:
        line = ["strace", "-f", "-y", "-xx", "-s", "100000000", "-e", f"trace={CALLS}", "-o", log.name]
        subprocess.run([*line, sys.executable, "-c", script], check=True, capture_output=True)
        lines, part = log.read().splitlines(), "".join(f"\\x{byte:02x}" for byte in str(folder).encode())
    found, ours = [], set()
    for line in lines:
        match = _LINE.match(line.strip())
        if match is None or int(match[3]) < 0:
            continue
        call, arguments, result = match[1], match[2], int(match[3])
        number = _FD.match(arguments)
        if call in ("open", "openat", "creat"):
            (ours.add if part in arguments else ours.discard)(result)
        if part in arguments or (number and int(number[1]) in ours):
            found.append((call, arguments, result))
    return found


def check(kind):
    """(system calls, states looked at, states that load as neither) of one kind of save."""
    write, read = SAVED[kind]
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base).resolve() / kind
        folder.mkdir()
        write(folder, 1.0)
        disk, seen, wrong = Disk(folder), set(), []
        calls = trace(kind, folder)
        for number in range(len(calls) + 1):
            for state in disk.states():
                key = hash(frozenset(state.items()))
                if key in seen:
                    continue
                seen.add(key)
                shutil.rmtree(folder)
                folder.mkdir()
                for path, content in state.items():
                    Path(path).write_bytes(content)
                try:
                    found = read(folder)
                except ValueError as error:
                    found = error
                if found not in ({1.0}, {2.0}, {NOTHING} if kind in MAY_BE_NOTHING else {1.0}):
                    last = calls[number - 1][0] if number else "nothing"
                    wrong.append(f"{kind}, after {number} calls, the last {last}: {found!r:.200}")
            if number < len(calls):
                disk.apply(*calls[number])
        if found != {2.0}:
            wrong.append(f"{kind}: the whole save reads as {found!r:.200}")
    return len(calls), len(seen), wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a CSV, one row a kind")
    asked = parser.parse_args()
    if shutil.which("strace") is None:
        print("no strace: what a save calls cannot be traced (Debian: apt install strace)")
        return 0
    rows = []
    for kind in SAVED:
        calls, states, wrong = check(kind)
        rows.append({"kind": kind, "system_calls": calls, "states": states, "neither_old_nor_new": len(wrong)})
        print(json.dumps(rows[-1]), *wrong[:5], sep="\n", flush=True)
    table(rows, asked.out)
    return 1 if any(row["neither_old_nor_new"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
