"""Rows of a data file: JSONL, JSON, Parquet, CSV and TSV, as dicts in the order of the file."""

import csv
import json
from pathlib import Path

__all__ = ["read_rows"]


def read_rows(path):
    """[dict] of a .jsonl, .json (a list), .parquet (with pyarrow), .tsv or .csv (with a header).

    Raises:
        OSError, ValueError: it cannot be read, holds no rows, or a row is not an object. The error names the row.
    """
    path = Path(path)
    if path.suffix not in _READERS:
        raise ValueError(f"{path} is none of {', '.join(_READERS)}")
    rows = _READERS[path.suffix](path)
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} has no rows")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} of {path} is {row!r:.60}, expected an object with columns")
    return rows


def _lines(path):
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):  # splitlines would cut at U+2028
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"line {number} of {path} is not JSON: {error}") from None
    return rows


def _whole(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def _parquet(path):
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"{path} is Parquet, which needs pyarrow: pip install pyarrow, or give .jsonl") from None
    try:
        return parquet.read_table(path).to_pylist()
    except ArrowException as error:
        raise ValueError(f"{path} is no Parquet file: {error}") from None


def _table(path):
    tabs = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, **tabs))


_READERS = {".jsonl": _lines, ".json": _whole, ".parquet": _parquet, ".tsv": _table, ".csv": _table}
