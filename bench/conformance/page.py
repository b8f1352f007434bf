"""The part of docs/families.md that bench/results/conformance.csv says: python -m bench.conformance.page writes it anew."""

from pathlib import Path

from . import KINDS
from .__main__ import OUT, OUT_COMPILED, rows_of

PAGE = Path("docs/families.md")
BEGIN, END = "<!-- conformance -->\n", "<!-- conformance end -->"
VERDICTS = ("right", "refused", "not built", "not run", "wrong")


def counts(rows):
    """{kind: {verdict: how many classes}}"""
    found = {kind: dict.fromkeys(VERDICTS, 0) for kind in KINDS}
    for row in rows:
        found[row["kind"]][row["verdict"]] += 1
    return {kind: by for kind, by in found.items() if any(by.values())}


def text(rows):
    """The tables, in Markdown."""
    version, torch = ({row[name] for row in rows if row[name]} for name in ("transformers", "torch"))
    if not rows:
        return "The table has no rows yet: `make conformance` writes it.\n"
    lines = [f"transformers {', '.join(sorted(version))}, torch {', '.join(sorted(torch))}:", ""]
    lines += ["| classes | tried | " + " | ".join(VERDICTS) + " |", "|---" * (len(VERDICTS) + 2) + "|"]
    for kind, by in counts(rows).items():
        lines.append(f"| {kind} | {sum(by.values())} | " + " | ".join(map(str, by.values())) + " |")
    lines += ["", "Those that are not right:", "", "| class | verdict | why |", "|---|---|---|"]
    for row in sorted(rows, key=lambda row: (list(KINDS).index(row["kind"]), row["class"])):
        if row["verdict"] != "right":
            why = row["note"].replace("|", "\\|").replace("<", "&lt;")[:110]
            lines.append(f"| {row['class']} | {row['verdict']} | {why} |")
    return "\n".join(lines) + "\n"


def compiled(rows):
    """What is said of torch.compile, in Markdown."""
    if not rows:
        return ""
    lines = ["", "torch.compile alone:", "", "| backend | " + " | ".join(VERDICTS) + " | not right |"]
    lines += ["|---" * (len(VERDICTS) + 2) + "|"]
    for backend in ("inductor", "eager"):
        those = [row for row in rows if row["backend"] == backend]
        by = [sum(row["verdict"] == verdict for row in those) for verdict in VERDICTS]
        names = ", ".join(sorted(row["class"] for row in those if row["verdict"] != "right")) or "–"
        lines += [f"| {backend} | {' | '.join(map(str, by))} | {names} |"] if those else []
    return "\n".join(lines) + "\n"


def page(said, rows, rows_compiled=()):
    """The page with this part anew."""
    head, rest = said.split(BEGIN)
    return head + BEGIN + text(rows) + compiled(rows_compiled) + END + rest.partition(END)[2]


if __name__ == "__main__":
    found = (list(rows_of(path).values()) for path in (OUT, OUT_COMPILED))
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), *found), encoding="utf-8")
