"""python -m bench.effects: see the package."""

import argparse
import importlib
import inspect
from pathlib import Path

from .. import report
from . import __doc__ as about

ROOT = Path(__file__).resolve().parents[2]
ON_CHAT = ("chat", "preferred", "gated", "valued", "aligned", "roles", "traits")  # need the chat model alone
WITH_DATA = ("truth", "concepts", "steering", "sst2", "recontrol", "rahf")  # need --data
PARTS = (*ON_CHAT, *WITH_DATA)


def main():
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts")
    parser.add_argument("--tables", action="store_true", help="measure nothing: only the page's tables, from the CSVs")
    parser.add_argument("--first", action="store_true", help="of the studies on the chat model, the first fold or seed alone")
    parser.add_argument("--data", type=Path, help="folder of small trained models and texts: see docs/effects.md")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of the CSVs")
    options = parser.parse_args()
    if not options.tables:
        measure(options)
    print(*report.write(options.out, report.EFFECTS), sep="\n")


def measure(options):
    for name in options.only:
        part = importlib.import_module(f".{name}", __package__)
        more = {"first": True} if options.first and "first" in inspect.signature(part.run).parameters else {}
        if name in ON_CHAT:
            part.run(options.out, **more)
        elif options.data is None or not options.data.is_dir():
            print(f"{name}: skipped, it needs the models and texts that docs/effects.md lists; give their folder by --data")
        else:
            part.run(options.data, options.out, **more)


if __name__ == "__main__":
    main()
