"""Markdown tables from the CSV alone."""

import csv
import pathlib

PEERS = ("eager", "compile", "nn_norm", "liger", "add", "no edit", "ungated", "triton")
KEY = ("op", "mode", "dtype", "rows", "width", "rank", "slots")
NAMES = {"nn_norm": "torch's norm + eager edit", "compile": "torch.compile", "liger": "Liger", "add": "plain add"}


def cases_of(path):
    """{(op, mode, dtype, rows, width, rank, slots): {variant: row}}; ours is under `fastedit`."""
    cases = {}
    with pathlib.Path(path).open(newline="") as file:
        for row in csv.DictReader(file):
            key = tuple(int(row[k]) if row[k].isdigit() else row[k] for k in KEY)
            ours = row["backend"] in ("cpu", "cuda", "reference") or (row["backend"] == "triton" and row["ratio"] == "1.000")
            cases.setdefault(key, {})["fastedit" if ours else row["backend"]] = row
    return cases


def share_of_limit(path, keep=lambda key: key[3] > 1 and key[5] in (0, 4) and key[6] == 1):
    """For each case: our time, GB/s and share of the copy's speed, and each peer's time as a multiple of ours."""
    cases = {key: rows for key, rows in cases_of(path).items() if "fastedit" in rows and keep(key)}
    peers = [p for p in PEERS if any(p in rows for rows in cases.values())]
    head = ["op", "dtype", "rows × width", "rank", "µs", "GB/s", "of the copy's speed", "of a clone's"]
    lines = [_row([*head, *(NAMES.get(p, p) for p in peers)]), _row(["---"] * (len(head) + len(peers)))]
    for (op, mode, dtype, rows, width, rank, _), found in sorted(cases.items(), key=_order):
        ours = found["fastedit"]
        name = op if mode == "forward" else f"{op} backward"
        cells = [
            name, dtype, f"{rows} × {width}", rank, f"{float(ours['us_p50']):.0f}", ours["gb_s"],
            f"{float(ours['share_of_copy']):.2f}", f"{float(ours['share_of_clone']):.2f}",
        ]  # fmt: skip
        lines.append(_row([*cells, *(_ratio(found.get(p)) for p in peers)]))
    return "\n".join(lines)


def one_row(path):
    """What a call costs: one row, each peer's time as a multiple of ours."""
    return share_of_limit(path, keep=lambda key: key[3] == 1 and key[4] == 4096 and key[6] == 1)


def sweeps(path, op="edit_add_norm", dtype="bf16"):
    """The op's other shapes, ranks and slots, forward and backward."""
    centre = {(512, 4096), (16384, 4096), (4096, 4096), (131072, 4096)}
    return share_of_limit(
        path, lambda key: key[0] == op and key[2] == dtype and key[3] > 1
        and (key[3:5] not in centre or key[5] not in (0, 4) or key[6] > 1),
    )  # fmt: skip


def _order(item):
    op, mode, dtype, rows, width, rank, slots = item[0]
    order = ("edit", "edit_add", "edit_add gated", "edit_add_norm", "project").index(op)
    return mode != "forward", order, rows, width, rank, slots, dtype


def _ratio(row):
    return "" if row is None else f"{float(row['ratio']):.2f}"


def _row(cells):
    return "| " + " | ".join(map(str, cells)) + " |"
