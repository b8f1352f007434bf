"""Puts the tables of the CSVs into the pages of docs/, between their markers; measures nothing.

    python -m bench.report bench/results

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; a table whose CSV is not there is left as it is.
"""

import pathlib
import re
import sys

from . import bank, host
from .effects import (
    aligned,
    chat,
    concepts,
    gated,
    preferred,
    rahf,
    recontrol,
    roles,
    sst2,
    steering,
    traits,
    truth,
    valued,
)
from .kernels import table as kernels
from .models import rows as models
from .models import table as models_table
from .training import preferences, smollm2

DOCS = pathlib.Path(__file__).resolve().parent.parent / "docs"
PAGE, EFFECTS = DOCS / "performance.md", DOCS / "effects.md"
PAGES = (PAGE, DOCS / "bank.md", EFFECTS, DOCS / "training.md")


def models_of_red(path):
    """RED's rows of the model study: a variant a line, a size and work a column."""
    found = [row for row in models.read(path).values() if row["kind"] == "red" and row["ratio"]]
    columns = list(dict.fromkeys((row["size"], row["work"]) for row in found))
    at = {(row["variant"], row["size"], row["work"]): f"{row['ratio']} ± {row['ratio_95']}" for row in found}
    lines = ["| | " + " | ".join(f"{size}: {work}" for size, work in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for variant in dict.fromkeys(row["variant"] for row in found):
        lines.append(f"| {variant} | " + " | ".join(at.get((variant, *column), "") for column in columns) + " |")
    return "\n".join(lines)


TABLES = {
    "kernels": ("kernels-cpu.csv", kernels.share_of_limit),
    "one row": ("kernels-cpu.csv", kernels.one_row),
    "sweeps": ("kernels-cpu.csv", kernels.sweeps),
    "host": ("host-cpu.csv", host.table),
    "red in models": ("models-cpu.csv", models_of_red),
    "models": ("models-cpu.csv", models_table.markdown),
    "bank": ("bank.csv", bank.table),
    "dpo steps": ("dpo_steps.csv", preferences.markdown),
    "chat": ("effects-chat.csv", chat.markdown),
    "chat gates": ("effects-chat-gates.csv", chat.gates_markdown),
    "preferred": ("effects-preferred.csv", preferred.markdown),
    "truth": ("effects-truth.csv", truth.markdown),
    "concepts": ("effects-concepts.csv", concepts.markdown),
    "gated": ("effects-gated.csv", gated.markdown),
    "valued": ("effects-valued.csv", valued.markdown),
    "aligned": ("effects-aligned.csv", aligned.markdown),
    "roles": ("effects-roles.csv", roles.markdown),
    "traits": ("effects-traits.csv", traits.markdown),
    "sft": ("sft_smollm2.csv", smollm2.markdown),
    "steering": ("effects-steering.csv", steering.markdown),
    "re-control": ("effects-recontrol.csv", recontrol.markdown),
    "sst2": ("sst2_red.csv", sst2.markdown),
    "rahf": ("effects-rahf.csv", rahf.markdown),
}


def filled(page, results):
    """The page's text with every table whose CSV is in the folder `results` made anew."""
    for name, (csv, render) in TABLES.items():
        path = pathlib.Path(results) / csv
        if path.exists():
            opening = f"<!-- table: {name} -->"
            if opening not in page:
                continue
            block = f"{opening}\n{render(path).strip()}\n<!-- end -->"
            page = re.sub(re.escape(opening) + r".*?<!-- end -->", lambda _, block=block: block, page, flags=re.DOTALL)
    return page


def write(results, *pages):
    """The pages, or all that have tables, with those of the folder `results`; returns their paths."""
    pages = pages or PAGES
    for page in pages:
        page.write_text(filled(page.read_text(), results))
    return pages


if __name__ == "__main__":
    print(*write(sys.argv[1] if len(sys.argv) > 1 else "bench/results"), sep="\n")
