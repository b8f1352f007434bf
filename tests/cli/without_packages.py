"""Run by test_cli_without_packages.py in a process of its own: commands where packages cannot be imported.

    python without_packages.py FOLDER < cases.json > answers.json

cases: [[packages that are missing, arguments], …]. answers: [[exit code, what was printed], …]. FOLDER is the working folder.
"""

import contextlib
import importlib.abc
import importlib.util
import io
import json
import os
import sys

missing = set()


class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def run(packages, arguments):
    from fastedit import cli

    missing.clear()
    missing.update(packages)
    sys.argv, said = ["fastedit", *arguments], io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            cli.main()
        except SystemExit as end:
            return end.code, said.getvalue()
        except BaseException as error:  # what a user would see as a traceback
            return None, f"{said.getvalue()}Traceback: {error!r}"


def find_spec(name, package=None, real=importlib.util.find_spec):
    return None if name.partition(".")[0] in missing else real(name, package)


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    cases = json.load(sys.stdin)
    missing.update(cases[0][0])
    sys.meta_path.insert(0, Missing())
    importlib.util.find_spec = find_spec
    answers = [run(*case) for case in cases]
    print(json.dumps(answers))
