"""python -m bench.conformance [--out CSV] [--limit SECONDS] [--compile] [WORD …]: see bench/conformance/__init__.py."""

import argparse
import csv
import os
import signal
import sys
from pathlib import Path

from . import FIELDS, KINDS, backend_of, classes, measure, row_of

OUT, OUT_COMPILED = Path("bench/results/conformance.csv"), Path("bench/results/conformance_compiled.csv")


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.conformance")
    parser.add_argument("words", nargs="*", help="only classes whose names hold one of these; said and not kept")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--limit", type=int, default=90, help="seconds a class")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--part", default="0/1", help="such as 1/4: every fourth class, beginning with the second")
    parser.add_argument("--compile", action="store_true", help="torch.compile alone; Inductor for a dozen classes")
    options = parser.parse_args()
    out = options.out or (OUT_COMPILED if options.compile else OUT)
    warm_up()
    done = {} if options.words else rows_of(out)
    part, parts = map(int, options.part.split("/"))
    asked = classes(options.kinds.split(","))[part::parts]
    if options.compile:  # those that take Inductor first
        asked.sort(key=lambda one: backend_of(one[1]) != "inductor")
    for kind, name in asked:
        if options.words and not any(word in name for word in options.words):
            continue
        if (kind, name) in done:
            continue
        row = apart(kind, name, options.limit, backend_of(name) if options.compile else "")
        said = ("class", "verdict", "right", "refused", "left_out", "wrong", "note")
        print(" ".join(f"{name}={row[name]}" for name in said), flush=True)
        if not options.words:
            keep(out, row)


def warm_up():
    """What every class imports, once, before processes are forked."""
    import warnings

    import torch
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    measure("causal", "BambaForCausalLM")


def apart(kind, name, limit, backend):
    """The row of one class, made in a process of its own: a crash or a class that takes too long costs that row alone."""
    reads, writes = os.pipe()
    process = os.fork()
    if not process:
        signal.alarm(limit)
        try:
            os.close(reads)
            with os.fdopen(writes, "w", newline="") as out:
                csv.DictWriter(out, FIELDS).writerow(measure(kind, name, backend))
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writes)
    with os.fdopen(reads, newline="") as back:
        found = list(csv.DictReader(back, FIELDS))
    _, status = os.waitpid(process, 0)
    if found and not status:
        return found[0]
    why = f"more than {limit} s" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM else f"ended with {status}"
    return row_of(kind, name, backend) | {"verdict": "not run", "note": why}


def rows_of(path):
    """{(kind, class): row}"""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {(row["kind"], row["class"]): row for row in csv.DictReader(file)}


def keep(path, row):
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    sys.exit(main())
