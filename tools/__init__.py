"""Campaigns that take minutes to hours; docs/reliability.md has their figures."""

import csv


def table(rows, out):
    """A CSV of dicts with the same keys, where a path is given."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
