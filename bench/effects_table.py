"""The table of bench/results/effects.csv in docs/methods.md, between its two marks."""

import csv
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "methods.md"
START, END = "<!-- effects: python -m bench.effects -->", "<!-- end of effects -->"


def table(rows):
    """Markdown lines."""
    lines = ["| theme | direction | dose (KL) | strength | stories with the word | words known | bits a character |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        number = {name: float(row[name]) for name in row if name not in ("theme", "direction")}
        share = f"{100 * number['share']:.1f} % ({100 * number['share_low']:.0f}–{100 * number['share_high']:.0f})"
        dose = f"{number['dose']:g}" if row["direction"] == "theme" else "–"
        lines.append(
            f"| {row['theme']} | {row['direction']} | {dose} | {number['strength']:.2f} | {share} | "
            f"{100 * number['known_words']:.1f} % | {number['bits_per_character']:.2f} |"
        )
    return lines


def write_table(results):
    with open(results, newline="") as file:
        lines = table(list(csv.DictReader(file)))
    page = PAGE.read_text()
    head, _, rest = page.partition(START)
    _, _, tail = rest.partition(END)
    if END not in rest:
        raise ValueError(f"{PAGE} lacks the marks {START} and {END}")
    PAGE.write_text(head + START + "\n" + "\n".join(lines) + "\n" + END + tail)
