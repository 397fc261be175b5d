"""Committed records stay readable: a report of them has the figures of the table that was made of them then."""

import json

import pytest

from src.reporting.rows import summarise
from src.reporting.table import records
from src.runs.record import records_below
from tests.conftest import PROJECT

FOLDERS = sorted(path for path in (PROJECT / "results").rglob("runs") if (path.parent / "table.json").is_file())


def figures(row):
    return (row["support_set_size"], row["seeds"], *(row[key] or -1 for key in sorted(row) if "/" in key))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(PROJECT / "results").parent))
def test_a_report_of_old_records_has_the_old_figures(folder):
    rows, _ = summarise([record for _, record in records_below(folder)])
    written = json.loads((folder.parent / "table.json").read_text())["rows"]
    assert len(rows) == len(written)
    for new, old in zip(sorted(map(figures, records(rows))), sorted(map(figures, written)), strict=True):
        assert new == pytest.approx(old, abs=1e-9)
    named = {"untrained", "SimCLR", "nothing stored", "NNCLR", "KMCLR", "BYOL", "MNN", "MNN, prototypes"}
    assert named.issuperset(row.name for row in rows)


def test_there_are_old_results():
    assert len(FOLDERS) > 5
