"""The CSV as Markdown: a table for each size and work, a row a variant, a column a kind of edit.

    python -m bench.models.table bench/results/models-cpu.csv
"""

import pathlib
import sys

from . import rows


def markdown(path):
    """The tables of a CSV as one string."""
    found = rows.read(path).values()
    parts = []
    for size, work in _in_order((r["size"], r["work"]) for r in found):
        cell = [r for r in found if (r["size"], r["work"]) == (size, work)]
        parts.append(f"### {size}: {work}\n\n{_times(cell)}")
        counts = _counts(cell)
        if counts:
            parts.append(counts)
    notes = _notes(found)
    return "\n\n".join(parts + ([notes] if notes else [])) + "\n"


def write(path):
    """The tables into a file beside the CSV; returns its path."""
    target = pathlib.Path(path).with_suffix(".md")
    target.write_text(markdown(path))
    return target


def _in_order(items):
    return list(dict.fromkeys(items))


def _times(cell):
    """Ratios with their intervals."""
    return _grid(cell, [r for r in cell if r["ratio"]], _ratio, "ratio")


def _ratio(row):
    return f"{row['ratio']} ± {row['ratio_95']}" if row["ratio_95"] != "inf" else f"{row['ratio']} (one process)"


def _counts(cell):
    """Operations and bytes a layer, peak memory: what has no interval."""
    counted = [r for r in cell if r["ops_layer"] or r["peak_bytes"]]
    return _grid(cell, counted, _counted, "operations a layer, MB a layer, peak MB") if counted else ""


def _counted(row):
    figures = [row["ops_layer"] or "–", _megabytes(row["bytes_layer"])]
    return ", ".join(figures + ([_megabytes(row["peak_bytes"])] if row["peak_bytes"] else []))


def _megabytes(number):
    return f"{int(number) / 1e6:.3g}" if number else "–"


def _grid(cell, shown, figure, title):
    kinds, variants = _in_order(r["kind"] for r in cell), _in_order(r["variant"] for r in cell)
    at = {(r["variant"], r["kind"]): figure(r) for r in shown}
    lines = [f"| {title} | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for variant in variants:
        figures = [at.get((variant, kind), "") for kind in kinds]
        if any(figures):
            lines.append(f"| {variant} | {' | '.join(figures)} |")
    return "\n".join(lines)


def _notes(found):
    """Each note once, with the variants and kinds that it is about."""
    about = {}
    for r in found:
        if r["note"]:
            about.setdefault((r["variant"], r["note"]), []).append(r)
    lines = []
    for (variant, note), noted in about.items():
        kinds = ", ".join(_in_order(r["kind"] for r in noted))
        lines.append(f"- {variant} ({kinds}; {len(noted)} row{'s' * (len(noted) > 1)}): {note}")
    return "Notes:\n\n" + "\n".join(lines) if lines else ""


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(markdown(name))
