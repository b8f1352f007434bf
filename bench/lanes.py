"""The second lane: what the suite said on the newest of everything, as a table; and its versions as the constraints.

    python -m bench.lanes tests.xml --constraints constraints.txt --out bench/results/newest.md
    python -m bench.lanes tests.xml --constraints constraints.txt --renew     only if no test failed
"""

import argparse
import datetime
import platform
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree


def tested(path):
    """(the comment at the top, {package: version}) of a constraints file."""
    lines = Path(path).read_text().splitlines()
    pins = (line.partition("==") for line in lines if line and not line.startswith("#"))
    return [line for line in lines if line.startswith("#")], {name: version for name, _, version in pins}


def installed(names):
    """{package: version} here, without local parts ("+cpu"); None for one that is not installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def outcome(path):
    """({"tests", "failures", "errors", "skipped"}: how many, names of the tests that failed) of pytest's --junitxml."""
    suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    counts = {name: sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for suite in suites for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]  # fmt: skip
    return counts, failed


def table(pins, here, counts, failed):
    """Markdown: the outcome, and each package whose version is not the tested one."""
    lines = [
        "# The suite on the newest of everything", "",
        f"{datetime.date.today()}, Python {platform.python_version()}, {platform.machine()}: {counts['tests']} tests, "
        f"{counts['failures'] + counts['errors']} failed, {counts['skipped']} skipped.", "",
    ]  # fmt: skip
    lines += [f"- `{name}`" for name in failed] + ([""] if failed else [])
    lines += ["| package | tested | newest |", "|---|---|---|"]
    changed = {name for name in pins if here[name] is not None and here[name] != pins[name]}
    lines += [f"| {name} | {pins[name]} | {here[name]} |" for name in sorted(changed)]
    same = len([name for name in pins if here[name] == pins[name]])
    return "\n".join([*lines, "", f"{same} packages have the tested version."]) + "\n"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", help="pytest's --junitxml")
    parser.add_argument("--constraints", required=True)
    parser.add_argument("--out", help="where the table goes")
    parser.add_argument("--renew", action="store_true", help="write these versions into the constraints")
    given = parser.parse_args(arguments)
    head, pins = tested(given.constraints)
    here = installed(pins)
    counts, failed = outcome(given.tests)
    if given.out:
        Path(given.out).write_text(table(pins, here, counts, failed))
        print(f"wrote {given.out}")
    if given.renew:
        if failed or not counts["tests"]:
            raise SystemExit(f"not renewed: {len(failed)} of {counts['tests']} tests failed")
        new = [f"{name}=={here[name] or pins[name]}" for name in pins]
        Path(given.constraints).write_text("\n".join([*head, *new]) + "\n")
        print(f"wrote {given.constraints}")


if __name__ == "__main__":
    main()
