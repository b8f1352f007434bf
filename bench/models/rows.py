"""The CSV of the study: one row a size, kind, work and variant; what a run does not measure again stays."""

import csv
import math
import pathlib
import statistics

from fastedit.verifying.timing import T95

from .registry import KINDS, WORKS, variants
from .sizes import SIZES

FIELDS = (
    "size", "kind", "work", "variant", "ratio", "ratio_95", "ms_p50", "ops_layer", "bytes_layer", "peak_bytes",
    "trained", "processes", "note", "dtype", "machine", "torch", "transformers", "commit",
)  # fmt: skip
KEY = FIELDS[:4]
COUNTS = ("ops_layer", "bytes_layer", "peak_bytes", "trained")


def key(row):
    return tuple(row[name] for name in KEY)


def read(path):
    """{key: row} of a CSV, empty where there is none. Rows from before there were kinds of edit are RED's."""
    path = pathlib.Path(path)
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = [dict.fromkeys(FIELDS, "") | {"kind": "red"} | row for row in csv.DictReader(file)]
    return {key(row): row for row in rows}


def merged(old, new):
    """Old rows with the new in their places; a row that was not timed does not displace one that was."""
    kept = dict(old)
    for at, row in new.items():
        if row["ratio"] or not kept.get(at, row)["ratio"]:
            kept[at] = row
    return kept


def write(path, rows):
    """The rows in the order of the tables that name their parts; what no table names any more comes last."""
    places = [{name: n for n, name in enumerate(names)} for names in (SIZES, KINDS, WORKS, variants())]

    def place(row):
        return [places[i].get(part, len(places[i])) for i, part in enumerate(key(row))]

    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(sorted(rows.values(), key=place))
    partial.replace(path)
    return path


def summary(results):
    """The figures of one row from the processes' own: [{"ratio", "ms", counts …}] → CSV cells."""
    timed = [r for r in results if "ratio" in r]
    row = {name: next((r[name] for r in results if name in r), "") for name in COUNTS}
    row |= {"note": results[-1]["note"], "processes": len(timed), "ratio": "", "ratio_95": "", "ms_p50": ""}
    if not timed:
        return row
    ratios = [r["ratio"] for r in timed]
    n = len(ratios)
    half = _t95(n - 1) * statistics.stdev(ratios) / math.sqrt(n) if n > 1 else math.inf
    return row | {
        "ratio": f"{statistics.median(ratios):.3f}", "ratio_95": f"{half:.3f}",
        "ms_p50": f"{statistics.median(r['ms'] for r in timed):.3f}",
    }  # fmt: skip


def _t95(freedom):
    return T95.get(freedom) or T95[max(k for k in T95 if k <= freedom)]
