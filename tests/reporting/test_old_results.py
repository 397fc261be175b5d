"""Committed records stay readable: a report of them equals the committed table, and the pages quote its figures."""

import contextlib
import json

import pytest

from src.reporting.rows import summarise
from src.reporting.table import document, records, table, with_column_notes
from src.runs.record import records_below
from tests.conftest import PROJECT

FOLDERS = sorted(path for path in (PROJECT / "results").rglob("runs") if (path.parent / "table.json").is_file())


def figures(row):
    return (row["support_set_size"], row["seeds"], *(row[key] or -1 for key in sorted(row) if "/" in key))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(PROJECT / "results").parent))
def test_a_report_of_old_records_has_the_old_table(folder):
    runs = sorted((record for _, record in records_below(folder)), key=lambda run: run.start_time)
    rows, notes = summarise(runs)
    saved = json.loads((folder.parent / "table.json").read_text())
    written, cells = saved["rows"], table(rows)
    text = document(rows, cells, with_column_notes(cells[0], notes), saved["experiment"])
    assert text == (folder.parent / "table.md").read_text()
    assert [(row.method, row.variant) for row in rows] == [(row["method"], row["variant"]) for row in written]
    for new, old in zip(sorted(map(figures, records(rows))), sorted(map(figures, written)), strict=True):
        assert new == pytest.approx(old, abs=1e-9)
    named = {
        "untrained",
        "SimCLR",
        "nothing stored",
        "NNCLR",
        "KMCLR",
        "BYOL",
        "MNN",
        "MNN, prototypes",
        "evolving prototypes",
    }
    assert named.issuperset(row.name for row in rows)


PAGES = {
    "support_size": ["runs", "published/runs", "published/control/runs", "original/runs"],
    "support_size_long": ["runs"],
    "teacher": ["runs"],
    "gpu": ["runs", "long/runs"],
}
COLUMNS = {
    "vectors": "support_set_size",
    "test linear top-1": "test/linear_top1",
    "test kNN": "test/knn_top1",
    "val linear": "val/linear_top1",
    "val kNN": "val/knn_top1",
}


def figures_in(page):
    """For each line of a page's first table: [mean] or [mean, deviation] of each of `COLUMNS`."""
    lines = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("|")]
    header, _, *body = [[cell.strip("* ").replace(",", "") for cell in cells] for cells in lines]
    for cells in body:
        with contextlib.suppress(IndexError, ValueError):  # a line of a later table
            yield [[float(each) for each in cells[header.index(name)].split(" ± ")] for name in COLUMNS]


@pytest.mark.parametrize("name", PAGES)
def test_each_row_of_the_records_is_in_its_pages_table_and_rounded_once(name):
    folder = PROJECT / "results" / name
    lines = list(figures_in((folder / "README.md").read_text()))
    for part in PAGES[name]:
        rows, _ = summarise([record for _, record in records_below(folder / part)])
        for row in rows:
            expected = [[float(row.size)]]
            for key in list(COLUMNS.values())[1:]:
                expected.append([row.mean(key), *([row.std(key)] if len(row.runs) > 1 else [])])
            assert any(
                all(one == pytest.approx(other, abs=0.0501) for one, other in zip(line, expected, strict=True))
                for line in lines
            ), (part, row.title, expected)


def test_the_wall_times_of_the_gpus_page_are_the_records():
    folder = PROJECT / "results/gpu"
    page = (folder / "README.md").read_text()
    runs = [record for _, record in records_below(folder)]
    assert len(runs) == 8
    for run in runs:
        minutes, seconds = divmod(round(run.seconds), 60)
        assert f"| {minutes} min {seconds} s" in page, run.name


def test_there_are_old_results():
    assert len(FOLDERS) > 5
