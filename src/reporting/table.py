"""Support-set size against accuracy: the table and the plot of a report's rows."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from src.config.names import UNTRAINED
from src.reporting import curves
from src.reporting.rows import FIGURES, Row
from src.runs.record import METRICS
from src.system.atomic_write import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOTTED = {"test/linear_top1": "Linear top-1 accuracy (%)", "test/linear_top5": "Linear top-5 accuracy (%)"}
MARKERS, LINES = "Dsov^PX*", ("--", "-.", "-", ":")
MOST_LINES = 2 * len(MARKERS)  # more series than that are a cloud


def table(rows: Sequence[Row]) -> list[list[str]]:
    """The table as text, its header first."""

    def number(row: Row, figure: str) -> str:
        mean, std = row.mean(figure), row.std(figure)
        return "-" if math.isnan(mean) else f"{mean:.2f}" if math.isnan(std) else f"{mean:.2f} ± {std:.2f}"

    header = ["method", "vectors", "bytes", "of largest queue", "seeds", *FIGURES.values()]
    body = [
        [
            row.label,
            f"{row.size:,}",
            decimal(row.stored_bytes),
            "-" if share is None else f"{share:.2%}",
            str(len(row.runs)),
            *(number(row, figure) for figure in FIGURES),
        ]
        for row, share in zip(rows, shares(rows), strict=True)
    ]
    return [header, *body]


def shares(rows: Sequence[Row]) -> list[float | None]:
    """Each row's support size over that of the largest queue; None where no run has a queue."""
    largest = max((row.size for row in rows if "queue_size" in row.runs[0].params), default=None)
    return [row.size / largest if largest else None for row in rows]


def records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The table as numbers; None for a figure that is missing."""

    def known(value: float) -> float | None:
        return None if math.isnan(value) else value

    return [
        {
            "method": row.method,
            "variant": row.variant,
            "support_set_size": row.size,
            "support_bytes": row.stored_bytes,
            "share_of_largest_queue": share,
            "seeds": len(row.runs),
        }
        | {f"{figure}_mean": known(row.mean(figure)) for figure in FIGURES}
        | {f"{figure}_std": known(row.std(figure)) for figure in FIGURES}
        for row, share in zip(rows, shares(rows), strict=True)
    ]


def caption(rows: Sequence[Row]) -> str:
    """What all runs have in common, and what the bars mean."""
    runs = [run for row in rows for run in row.runs]
    parts = []
    for key, text in (("data.name", "{}"), ("backbone.name", "{}"), ("epochs", "{} epochs")):
        values = {run.params.get(key) for run in runs}
        if len(values) == 1:
            parts.append(text.format(*values))
    if max(len(row.runs) for row in rows) > 1:
        parts.append("mean ± standard deviation over seeds")
    return ", ".join(parts)


def plot(rows: Sequence[Row]) -> Figure:
    """Accuracy against support-set size: a panel a figure, a line a method, a level across for one that stores none.

    Each variant has a line of its own; far more of them than markers, as in a search, are one cloud a method. The
    untrained encoder is far below, and would take the room that tells the others apart.
    """
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.method != UNTRAINED]
    is_cloud = len({row.label for row in rows}) > MOST_LINES
    series: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        series[row.name if is_cloud else row.label].append(row)
    columns = curves.legend_columns(series)
    canvas = Figure(figsize=(7.2, 3.3 + 0.2 * math.ceil(len(series) / columns)), layout="constrained")
    panels = canvas.subplots(1, len(PLOTTED))
    for axes, (figure, title) in zip(panels, PLOTTED.items(), strict=True):
        zero = _size_axis(axes, sorted({row.size for row in rows} - {0}))
        axes.set(ylabel=title, xlabel="Support-set size (vectors)")
        axes.grid(axis="y", color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        for place, (label, group) in enumerate(series.items()):
            points = [row for row in group if row.values(figure)]
            line = "" if is_cloud else LINES[(place + place // len(MARKERS)) % len(LINES)]
            if points:
                _series(axes, label, points, figure, zero, MARKERS[place % len(MARKERS)], line)
    canvas.suptitle(caption(rows), fontsize=9)
    handles, labels = max((axes.get_legend_handles_labels() for axes in panels), key=lambda found: len(found[0]))
    if handles:
        canvas.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, handlelength=3.5)
    return canvas


def _size_axis(axes: Axes, sizes: Sequence[int]) -> float:
    """A logarithmic axis that has room for 0 at its left, behind a break. Returns where 0 is."""
    smallest, largest = (sizes[0], sizes[-1]) if sizes else (1, 1)
    zero = smallest / max(3.0, (largest / smallest) ** 0.2)
    labelled: list[int] = []
    for size in reversed(sizes):  # each has a tick; its label has to find room
        characters = len(f"{size:,}{labelled[-1]:,}") if labelled else 0
        if not labelled or size * (largest / zero) ** (0.02 * characters) <= labelled[-1]:
            labelled.append(size)
    margin = (largest / zero) ** 0.07
    axes.set_xscale("log")
    axes.set_xlim(zero / margin, largest * margin)
    axes.set_xticks([zero, *labelled], ["0", *(f"{size:,}" for size in labelled)])
    axes.set_xticks(sizes, minor=True, labels=[""] * len(sizes))
    for side in (-1, 1) if sizes else ():
        middle = (zero * smallest) ** 0.5 * margin ** (side * 0.15)
        slash = [(-0.5, -1), (0.5, 1)]
        transform = axes.get_xaxis_transform()
        axes.plot([middle], [0], transform=transform, marker=slash, markersize=9, color="black", clip_on=False)
    return zero


def _series(axes: Axes, label: str, rows: Sequence[Row], figure: str, zero: float, marker: str, line: str) -> None:
    colour = rows[0].colour
    means, stds = [row.mean(figure) for row in rows], [row.std(figure) for row in rows]
    style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5, "capsize": 3, "linewidth": 1.3}
    axes.errorbar([row.size or zero for row in rows], means, stds, label=label, linestyle=line, **style)
    if rows[-1].size == 0 and line:
        axes.axhline(means[0], color=colour, linestyle=line, linewidth=1)
        if not math.isnan(stds[0]):
            axes.axhspan(means[0] - stds[0], means[0] + stds[0], color=colour, alpha=0.12, linewidth=0)


def courses(rows: Sequence[Row]) -> list[curves.Course]:
    """The rows' runs as curves over epochs, of those runs whose folders are here."""
    found = []
    for row in rows:
        here = tuple(run.directory for run in row.runs if run.directory and (run.directory / METRICS).is_file())
        if here:
            epochs = int(row.runs[0].params["epochs"])
            found.append(curves.Course(row.title, row.size, row.colour, epochs, here, row.method == UNTRAINED))
    return found


def write(rows: Sequence[Row], notes: Sequence[str], experiment: str, out: Path) -> list[Path]:
    """Writes table.md, table.csv, table.json, plot.png, plot.svg, and curves.png where there are any; returns paths."""
    from matplotlib import rc_context

    out.mkdir(parents=True, exist_ok=True)
    header, *body = table(rows)
    lines = [header, ["---"] * len(header), *body]
    markdown = [f"# {experiment}", "", caption(rows), "", *(f"| {' | '.join(line)} |" for line in lines), ""]
    page = "\n".join([*markdown, *(f"- {note}" for note in notes)])
    write_whole(out / "table.md", f"{page}\n".encode())

    numbers = records(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(numbers[0]))
    writer.writeheader()
    writer.writerows(numbers)
    write_whole(out / "table.csv", text.getvalue().encode())
    runs = [{"runs": [run.run_id for run in row.runs]} for row in rows]
    result = {
        "experiment": experiment,
        "rows": [one | two for one, two in zip(numbers, runs, strict=True)],
        "notes": list(notes),
    }
    write_whole(out / "table.json", f"{json.dumps(result, indent=1, allow_nan=False)}\n".encode())

    paths = [out / name for name in ("table.md", "table.csv", "table.json", "plot.png", "plot.svg")]
    with rc_context(
        {"font.size": 9, "svg.hashsalt": experiment, "text.parse_math": False}
    ):  # the same runs, the same bytes
        figure = plot(rows)
        figure.savefig(out / "plot.png", dpi=200)
        figure.savefig(out / "plot.svg", metadata={"Date": None})
        if found := courses(rows):
            paths.append(out / "curves.png")
            curves.compare(found).savefig(paths[-1], dpi=200)
    return paths


def show(rows: Sequence[Row], notes: Sequence[str], title: str) -> None:
    """Prints the table."""
    header, *body = table(rows)
    shown = Table(title=title, caption=caption(rows), box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    shown.add_column(header[0], overflow="fold")
    for name in header[1:]:
        shown.add_column("\n".join(name.split()), justify="right")  # narrow, for the labels' sake
    for line in body:
        shown.add_row(*line)
    console = Console(width=None if sys.stdout.isatty() else 120, markup=False)
    console.print(shown)
    for note in notes:
        console.print(f"note: {note}", markup=False, highlight=False)
