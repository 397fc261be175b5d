"""A report's rows as a table, in the terminal and in files, and the other files of a report."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import TextWrapper
from typing import Any

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from src.config.names import UNTRAINED
from src.errors import UsageError
from src.reporting import curves, page
from src.reporting.plots import caption, fitting, plot, to_svg, write_pdf, write_png
from src.reporting.rows import (
    ACCURACY,
    GAIN,
    RANKING,
    RIGHT_POSITIVES_TITLE,
    TABLE_METRICS,
    TableRow,
    control_of,
    cycle_of,
    difference,
    metrics_of,
)
from src.runs.record import METRICS, Record
from src.system.atomic_write import write_whole
from src.system.redact import one_line

logger = logging.getLogger(__name__)

# The columns that a terminal leaves out, one after the other, until the rest has room; the files have all columns.
SPARE_COLUMNS = (
    "bytes",
    "of largest queue",
    TABLE_METRICS["test/linear_top5"],
    TABLE_METRICS["test/knn_top1"],
    TABLE_METRICS["val/knn_top1"],
    RIGHT_POSITIVES_TITLE,
)
MAX_WHOLE_LABEL = 30  # characters; a longer label is wrapped before a column is left out
GAIN_NOTE = (
    f"{GAIN}: {TABLE_METRICS[ACCURACY]} less that of the same settings with nothing stored, the mean over pairs of "
    "runs with the same seed ± the half-width of its 95% interval (Student's t)"
)
COLUMN_NOTES = {
    GAIN: GAIN_NOTE,
    RIGHT_POSITIVES_TITLE: f"{RIGHT_POSITIVES_TITLE}: how often a validation image's positive is nearer to the mean of "
    "the image's class than to that of any other; with nothing stored the positive is the image's own embedding",
}


def table(rows: Sequence[TableRow]) -> list[list[str]]:
    """The table as text, its header first, without metrics that no row has.

    If any row has a queue, a column has the sizes as shares of the largest one. If any row has a control, the last
    column is the gain over the control (`GAIN_NOTE`).
    """
    metrics = {metric: title for metric, title in metrics_of(rows).items() if any(row.values(metric) for row in rows)}
    shares = [[] if share is None else [f"{share:.2%}"] for share in fractions_of_largest_queue(rows)]
    share_title = ["of largest queue"] if any(shares) else []
    header = ["method", "vectors", "bytes", *share_title, "seeds", *metrics.values()]
    body = [
        [
            row.label,
            f"{row.size:,}",
            decimal(row.stored_bytes),
            *share,
            str(len(row.runs)),
            *(row.text(metric) for metric in metrics),
        ]
        for row, share in zip(rows, shares, strict=True)
    ]
    controls = [control_of(row, rows) for row in rows]
    if any(controls):
        header.append(GAIN)
        body = [[*line, _gain(row, control)] for line, row, control in zip(body, rows, controls, strict=True)]
    return [header, *body]


def _gain(row: TableRow, control: TableRow | None) -> str:
    found = difference(row, control, ACCURACY)
    fewer = f" ({found.pairs} of {len(row.runs)} seeds)" if 0 < found.pairs < len(row.runs) else ""
    return found.text + fewer


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    escaped = [[cell.replace("|", r"\|") for cell in line] for line in (header, ["---"] * len(header), *body)]
    return [f"| {' | '.join(line)} |" for line in escaped]


def with_column_notes(header: Sequence[str], notes: Sequence[str]) -> list[str]:
    """Put the `COLUMN_NOTES` of the table's columns before the notes."""
    return [*(note for column, note in COLUMN_NOTES.items() if column in header), *notes]


def document(rows: Sequence[TableRow], cells: Sequence[Sequence[str]], notes: Sequence[str], experiment: str) -> str:
    """The content of table.md: the `table` of the rows, with its caption and notes."""
    header, *body = cells
    drawn = markdown(header, body)
    width = max(120, *map(len, drawn))
    wrapper = TextWrapper(width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    listed = [wrapper.fill(f"- {note}") for note in notes]
    return "\n".join([f"# {experiment}", "", caption(rows), "", *drawn, "", *listed, ""])


def fractions_of_largest_queue(rows: Sequence[TableRow]) -> list[float | None]:
    """Each row's support size as a fraction of the largest queue's; None if no run has a queue."""
    largest = max((row.size for row in rows if "queue_size" in row.runs[0].params), default=None)
    return [row.size / largest if largest else None for row in rows]


def records(rows: Sequence[TableRow]) -> list[dict[str, Any]]:
    """The table as numbers, a dict for each row; None for a metric that is missing."""
    metrics = metrics_of(rows)
    return [
        {
            "method": row.method,
            "variant": row.variant,
            "support_set_size": row.size,
            "support_bytes": row.stored_bytes,
            "share_of_largest_queue": fraction,
            "seeds": len(row.runs),
        }
        | {f"{metric}_mean": _known(row.mean(metric)) for metric in metrics}
        | {f"{metric}_std": _known(row.std(metric)) for metric in metrics}
        | _differences(row, rows, metrics)
        for row, fraction in zip(rows, fractions_of_largest_queue(rows), strict=True)
    ]


def summary(rows: Sequence[TableRow]) -> dict[str, float]:
    """A report in a few numbers: the metrics of the trained row that is best on validation, and of its control.

    Each is the mean over a row's seeds, in percent. Missing metrics are left out.
    """
    candidates = [row for row in rows if row.method != UNTRAINED and row.values(RANKING)]
    if not candidates:
        return {}
    best = max(candidates, key=lambda row: row.mean(RANKING))
    named = {"best": best, "nothing_stored": best if best.is_control else control_of(best, rows)}
    return {"best/support_set_size": best.size} | {
        f"{name}/{metric}": row.mean(metric)
        for name, row in named.items()
        if row
        for metric in TABLE_METRICS
        if row.values(metric)
    }


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _differences(row: TableRow, rows: Sequence[TableRow], metrics: Iterable[str]) -> dict[str, float | None]:
    """For each metric, the gain over the control: mean over pairs, ends of its 95% interval, and number of pairs."""
    control = control_of(row, rows)
    numbers: dict[str, float | None] = {}
    for metric in metrics:
        found = difference(row, control, metric)
        numbers |= {f"{metric}_difference": _known(found.mean), f"{metric}_difference_low": _known(found.low)}
        numbers |= {f"{metric}_difference_high": _known(found.high), f"{metric}_pairs": found.pairs}
    return numbers


def _has_curves(run: Record) -> bool:
    """Whether a run's metrics are on this machine and readable; warn if they are here but cannot be read."""
    directory = run.directory
    # `Path.is_file` would raise an error if this process may not enter a folder above.
    if directory is None or not os.path.isfile(directory / METRICS):
        return False
    try:
        there = Record.find(directory)
        curves.read(directory)
    except (UsageError, OSError) as error:
        logger.warning("%s: its curves are left out (%s)", directory, one_line(error))
        return False
    return there is not None and there.uuid == run.uuid  # else another run has the folder by now


def courses(rows: Sequence[TableRow]) -> list[curves.Course]:
    """The training curves of the rows, from those runs whose folders are on this machine."""
    found = []
    for row in rows:
        here = tuple(run.directory for run in row.runs if run.directory and _has_curves(run))
        if not here:
            continue
        title = f"{row.title} ({len(here)} of {len(row.runs)} seeds)" if len(here) < len(row.runs) else row.title
        params = row.runs[0].params
        found.append(
            curves.Course(
                title,
                row.name,
                row.size,
                row.colour,
                int(params["epochs"]),
                here,
                cycle_of(row),
                is_untrained=row.method == UNTRAINED,
                has_queue=params.get("support.name") == "queue",
            )
        )
    return found


def write(rows: Sequence[TableRow], notes: Sequence[str], experiment: str, out: Path) -> list[Path]:
    """Write the report's files: the table, the plot, results.html and, if there are curves, curves.png.

    Returns:
        The paths of the files.
    """
    from matplotlib import rc_context

    out.mkdir(parents=True, exist_ok=True)
    cells = table(rows)
    notes = with_column_notes(cells[0], notes)
    write_whole(out / "table.md", document(rows, cells, notes, experiment).encode())

    numbers = records(rows)
    sheet = io.StringIO()
    writer = csv.DictWriter(sheet, list(numbers[0]))
    writer.writeheader()
    writer.writerows(numbers)
    write_whole(out / "table.csv", sheet.getvalue().encode())
    with_ids = [one | {"runs": [run.run_id for run in row.runs]} for one, row in zip(numbers, rows, strict=True)]
    result = {"experiment": experiment, "rows": with_ids, "notes": list(notes)}
    write_whole(out / "table.json", f"{json.dumps(result, indent=1, allow_nan=False)}\n".encode())

    names = ("table.md", "table.csv", "table.json", "plot.png", "plot.svg", "plot.pdf", "results.html")
    paths = [out / name for name in names]
    # With the salt, equal runs give an SVG of equal bytes. Some publishers refuse PDFs with other fonts than TrueType.
    with rc_context({"font.size": 9, "svg.hashsalt": experiment, "pdf.fonttype": 42, "text.parse_math": False}):
        figure = plot(rows)
        write_png(figure, out / "plot.png", dpi=200)
        pictures = {"Support-set size and accuracy": to_svg(figure)}
        write_whole(out / "plot.svg", pictures["Support-set size and accuracy"].encode())
        write_pdf(figure, out / "plot.pdf")
        if drawn := curves.compare(courses(rows)):
            drawn.suptitle(fitting(caption(rows), drawn), fontsize=9)
            paths.append(out / "curves.png")
            write_png(drawn, paths[-1], dpi=200)
            pictures["Over the epochs"] = to_svg(drawn)
    write_whole(out / "results.html", page.render(experiment, rows, cells, pictures, notes).encode())
    return paths


def show(rows: Sequence[TableRow], notes: Sequence[str], title: str) -> None:
    """Print the table and its notes."""
    console = Console(width=None if sys.stdout.isatty() else 120, markup=False)
    header, *body = table(rows)

    def of(columns: Sequence[int]) -> Table:
        drawn = Table(title=title, caption=caption(rows), box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        drawn.add_column(header[0], overflow="fold")
        for place in columns[1:]:
            head, is_axis = "\n".join(header[place].split()), header[place] == "vectors"  # narrow, as labels need room
            drawn.add_column(head, justify="right", overflow="fold", no_wrap=is_axis)
        for line in body:
            drawn.add_row(*(line[place] for place in columns))
        return drawn

    columns, longest = list(range(len(header))), max((len(line[0]) for line in body), default=0)
    room = console.width + max(0, longest - MAX_WHOLE_LABEL)
    for spare in (*SPARE_COLUMNS, ""):
        drawn = of(columns)
        if console.measure(drawn, options=console.options.update_width(1000)).maximum <= room:
            break
        columns = [place for place in columns if header[place] != spare]
    console.print(drawn)
    for note in with_column_notes(header, notes):
        console.print(f"note: {note}", markup=False, highlight=False)
