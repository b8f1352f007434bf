"""python -m bench.effects: see the package."""

import argparse
from pathlib import Path

from .. import report
from . import __doc__ as about

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("steering", "sst2", "recontrol", "rahf")


def main():
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts")
    parser.add_argument("--tables", action="store_true", help="measure nothing: only the page's tables, from the CSVs")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder of models and texts")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of the CSVs")
    options = parser.parse_args()
    if not options.tables:
        measure(options)
    print(*report.write(options.out, report.METHODS), sep="\n")


def measure(options):
    if not options.shared.is_dir():
        raise SystemExit(f"{options.shared} is not there: expected the folder of models and texts; give --shared")
    from . import rahf, recontrol, sst2, steering

    parts = {"steering": steering, "sst2": sst2, "recontrol": recontrol, "rahf": rahf}
    for name in options.only:
        parts[name].run(options.shared, options.out)


if __name__ == "__main__":
    main()
