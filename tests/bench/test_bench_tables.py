"""Tables and pictures of the kernel study come from its CSV alone, and the page's from theirs."""

import csv
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench import report  # noqa: E402
from bench.kernels import cases, plot, study, table  # noqa: E402


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The CSV of two small cases, really measured."""
    path = tmp_path_factory.mktemp("results") / "kernels-cpu.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, study.FIELDS)
        writer.writeheader()
        for case in (cases.Case("edit_add", "forward", "bf16", 16, 64), cases.Case("edit_add_norm", "forward", "fp32", 1, 4096)):
            variants = cases.variants
            cases.variants = lambda *a, real=variants: {k: v for k, v in real(*a).items() if k != "compile"}
            try:
                for row in study.measure(case, "cpu", blocks=2, rounds=1):
                    writer.writerow(row | {"machine": "m", "torch": "t", "commit": "c"})
            finally:
                cases.variants = variants
    return path


def test_tables_have_a_line_a_case_and_each_peer(measured):
    lines = table.share_of_limit(measured).splitlines()
    assert len(lines) == 3 and lines[2].startswith("| edit_add | bf16 | 16 × 64 | 0 |")
    for peer in ("eager", "plain add", "no edit"):
        assert f" {peer} |" in lines[0] + " "
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    assert "| edit_add_norm | fp32 | 1 × 4096 |" in table.one_row(measured)
    found = table.cases_of(measured)["edit_add", "forward", "bf16", 16, 64, 0, 1]
    assert float(found["copy"]["share_of_copy"]) == 1 and float(found["clone"]["share_of_clone"]) == 1


def test_the_roofline_is_drawn(measured):
    assert plot.roofline(measured).read_bytes().startswith(b"\x89PNG")


def test_the_page_is_filled_between_its_markers(measured, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: kernels -->\nold\n<!-- end -->\nafter\n<!-- table: models -->\nkept\n<!-- end -->\n")
    report.write(measured.parent, page)
    text = page.read_text()
    assert text.startswith("before\n<!-- table: kernels -->\n| op |") and "old" not in text and "\nafter\n" in text
    assert "kept" in text


def test_the_bank_s_page_says_what_its_csv_says():
    results = ROOT / "bench" / "results"
    page = (ROOT / "docs" / "bank.md").read_text()
    assert report.filled(page, results) == page, "make it anew: python -m bench.report bench/results"
    with (results / "bank.csv").open(newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["what"] == "a call each")
    assert f"| a call each | a different edit each | {float(row['ratio']):.3f} ± " in page


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.name)
def test_every_table_of_the_real_pages_is_known(page):
    text = page.read_text()
    names = [line[len("<!-- table: "):-len(" -->")] for line in text.splitlines() if line.startswith("<!-- table: ")]
    assert names and set(names) <= set(report.TABLES) and text.count("<!-- end -->") == len(names)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_cut_sees_every_op_first_and_sweeps_afterwards(device):
    cut = list(cases.cut(False, device))
    assert len(cut) == len(set(cut))
    assert {(c.op, c.mode) for c in cut[:16]} == {(op, mode) for op in cases.OPS for mode in ("forward", "backward")}
    assert {c.rank for c in cut} >= {0, 1, 4, 8, 16, 32} and {c.slots for c in cut} == {1, 256}
    assert {c.width for c in cut} >= set(cases.WIDTHS) and {c.dtype for c in cut} == set(cases.DTYPES)
    full = list(cases.cut(True, device))
    assert full[: len(cut)] == cut and len(full) > 10 * len(cut)
