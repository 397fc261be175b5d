"""Support-set size against accuracy: a table and a plot of an experiment's runs.

    python -m src.report experiment=NAME
    python -m src.report sweep=ID
    python -m src.report experiment=NAME out=DIR tracking=jsonl

Writes table.md, table.csv, table.json, plot.png, plot.svg and, of runs whose folders are here, curves.png to DIR:
results/NAME, or results/NAME-ID of a sweep, unless it is set. The runs are read from MLflow, or with tracking=jsonl
from the run.json files under multirun/.
"""

from __future__ import annotations

import csv
import json
import math
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from src import curves
from src.config import DERIVED, METHODS, is_setting
from src.errors import UsageError
from src.record import METRICS
from src.runs import Run, read_runs, read_sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURES = {
    "val/knn_top1": "val kNN",
    "val/linear_top1": "val linear top-1",
    "test/linear_top1": "test linear top-1",
    "test/linear_top5": "test linear top-5",
}
PLOTTED = {"test/linear_top1": "Linear top-1 accuracy (%)", "test/linear_top5": "Linear top-5 accuracy (%)"}
NAMES = {"simclr": "SimCLR", "nnclr": "NNCLR", "kmclr": "KMCLR"}
COLOURS = {"simclr": "#404040", "nnclr": "#d55e00", "kmclr": "#0072b2"}  # Okabe and Ito: safe for the colour-blind
MARKERS, LINES = "Dsov^PX*", ("--", "-.", "-", ":")
MOST_LINES = 2 * len(MARKERS)  # more series than that are a cloud
SAME = ("dtype", "git_commit", "git_dirty", "device")  # tags that runs should share to be compared


@dataclass(frozen=True)
class Row:
    """The runs that differ only in their seed."""

    method: str
    size: int  # vectors that the method stores
    stored_bytes: int
    variant: str  # "key=value, ..." of the settings that, besides method and size, tell the report's rows apart
    label: str  # the method, and of the variant what is unusual
    runs: tuple[Run, ...]

    def values(self, figure: str) -> list[float]:
        """The figure of every run that has it, in percent."""
        return [value for run in self.runs if math.isfinite(value := run.metrics.get(figure, math.nan))]

    def mean(self, figure: str) -> float:
        return statistics.fmean(self.values(figure) or [math.nan])

    def std(self, figure: str) -> float:
        """The sample standard deviation, NaN for fewer than two runs."""
        values = self.values(figure)
        return statistics.stdev(values) if len(values) > 1 else math.nan


def summarise(runs: Sequence[Run]) -> tuple[list[Row], list[str]]:
    """Averages the runs that differ only in their seed, and no others.

    Returns:
        Rows by method, then support size; and notes on all that the figures alone would hide.
    """
    kept, notes = select(runs)
    keys = differing(kept)
    names = distinguishing(kept, keys)
    same: dict[tuple[str, str, int], list[Run]] = defaultdict(list)
    for run in kept:
        same[run.params["method.name"], _variant(run, names), int(run.params["support_set_size"])].append(run)
    common = usual(kept, keys)
    rows = [
        Row(
            method,
            size,
            int(group[0].params["support_bytes"]),
            variant,
            _label(group[0], names, common[method]),
            tuple(group),
        )
        for (method, variant, size), group in same.items()
    ]
    rows.sort(key=lambda row: (list(METHODS).index(row.method), row.label, row.variant, row.size))
    return rows, notes + _remarks(rows, keys, names, common)


def _remarks(
    rows: Sequence[Row], keys: Sequence[str], names: Sequence[str], common: Mapping[str, Mapping[str, str]]
) -> list[str]:
    """What the rows' labels leave unsaid, and what makes rows less comparable than they look."""
    notes = []
    if names:
        notes.append(f"the runs also differ in {', '.join(names)}: each combination has its own row")
    unsaid = dict.fromkeys(
        f"{NAMES[method]}'s {key.removeprefix('method.')}={value}" if key.startswith("method.") else f"{key}={value}"
        for method, values in common.items()
        for key, value in values.items()
        if key in names
    )
    if unsaid:
        notes.append(f"where a row does not say otherwise: {', '.join(unsaid)}")
    if implied := sorted(set(keys) - set(names)):
        notes.append(f"with {', '.join(names)} go {', '.join(implied)}")
    for tag in SAME:
        found = [{run.tags[tag] for run in row.runs if tag in run.tags} for row in rows]
        mixed = [f"{row.label} {row.size:,}" for row, values in zip(rows, found, strict=True) if len(values) > 1]
        if mixed:
            notes.append(f"the runs of a row differ in {tag}: {', '.join(mixed)}")
        elif len(set().union(*found)) > 1:
            notes.append(f"rows differ in {tag}")
    seeds = sorted({len(row.runs) for row in rows})
    if len(seeds) > 1:
        notes.append(f"the rows differ in their number of seeds: {seeds[0]} to {seeds[-1]}")
    for figure, title in FIGURES.items():
        lacking = [(row, len(row.values(figure))) for row in rows if len(row.values(figure)) < len(row.runs)]
        where = [f"{row.label} {row.size:,} ({len(row.runs) - n} of {len(row.runs)} runs)" for row, n in lacking]
        if where:
            notes.append(f"no {title}: {', '.join(where)}")
    return notes


def select(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """Keeps the finished runs, of each configuration and seed the newest, and notes what it leaves out."""
    repeats: dict[frozenset[tuple[str, str]], list[Run]] = defaultdict(list)
    unfinished = []
    for run in sorted(runs, key=lambda run: run.start_time):
        if run.status == "FINISHED" and run.params.get("method.name") in METHODS:
            repeats[frozenset(settings(run).items())].append(run)
        else:
            unfinished.append(
                f"{run.name} ({'pruned' if 'pruned' in run.tags else run.status.lower()})"
                if run.status != "FINISHED"
                else f"{run.name} (not a training run)"
            )
    notes = [f"left out: {', '.join(unfinished)}"] if unfinished else []
    notes += [
        f"{group[-1].name} was run {len(group)} times: only the newest counts"
        for group in repeats.values()
        if len(group) > 1
    ]
    return [group[-1] for group in repeats.values()], notes


def settings(run: Run) -> dict[str, str]:
    """The params that make two runs the same experiment."""
    return {key: value for key, value in run.params.items() if is_setting(key) and key not in DERIVED}


def differing(runs: Sequence[Run]) -> list[str]:
    """The settings, besides method, support size and seed, in which the runs differ.

    The settings of a method itself are compared among its own runs only.
    """
    by_method: dict[str, list[dict[str, str]]] = defaultdict(list)
    for run in runs:
        by_method[run.params["method.name"]].append(settings(run))
    everyone = [each for group in by_method.values() for each in group]
    keys = {key for each in everyone for key in each} - {"method.name", "k", "queue_size", "seed"}

    def differs(key: str) -> bool:
        groups = by_method.values() if key.startswith("method.") else [everyone]
        return any(len({each.get(key) for each in group}) > 1 for group in groups)

    return sorted(filter(differs, keys))


def distinguishing(runs: Sequence[Run], keys: Sequence[str]) -> list[str]:
    """As few of the keys as tell the same runs apart: a recipe is known by one of them.

    The names of options come first (``optimizer.name``), then the shortest keys.
    """
    kept: list[str] = []

    def groups(chosen: list[str]) -> int:  # a method does not excuse what is not its own: epochs, say
        shared = [key for key in chosen if not key.startswith("method.")]
        return sum(len({tuple(map(run.params.get, by)) for run in runs}) for by in (["method.name", *chosen], shared))

    for key in sorted(keys, key=lambda key: (not key.endswith(".name"), len(key), key)):
        if groups([*kept, key]) > groups(kept):
            kept.append(key)
    return kept


def usual(runs: Sequence[Run], keys: Sequence[str]) -> dict[str, dict[str, str]]:
    """What a row need not say: for each method, the values of the keys that more than half of the runs have.

    A setting of the method itself is counted among its own runs; a key that some runs lack is always said.
    """
    by_method: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_method[run.params["method.name"]].append(run)
    common: dict[str, dict[str, str]] = {method: {} for method in METHODS}
    for method, own in by_method.items():
        for key in keys:
            compared = own if key.startswith("method.") else runs
            values = Counter(run.params.get(key) for run in compared)
            ((value, times),) = values.most_common(1)
            if value is not None and None not in values and times > len(compared) / 2:
                common[method][key] = value
    return common


def _variant(run: Run, keys: Sequence[str]) -> str:
    return ", ".join(f"{key.removeprefix('method.')}={run.params[key]}" for key in keys if key in run.params)


def _label(run: Run, keys: Sequence[str], common: Mapping[str, str]) -> str:
    unusual = [key for key in keys if run.params.get(key) != common.get(key)]
    more = sum(run.params.get(key) != value for key, value in common.items() if key not in keys)
    text = re.sub(r"\d*\.\d{5,}(e[-+]?\d+)?", lambda number: f"{float(number[0]):.3g}", _variant(run, unusual))
    name = NAMES[run.params["method.name"]]
    return ", ".join(filter(None, [name, text])) + (f" and {more} more" if more else "")


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
    largest = max((row.size for row in rows if row.method == "nnclr"), default=None)
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

    Each variant has a line of its own; far more of them than markers, as in a search, are one cloud a method.
    """
    from matplotlib.figure import Figure

    is_cloud = len({row.label for row in rows}) > MOST_LINES
    series: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        series[NAMES[row.method] if is_cloud else row.label].append(row)
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
    apart = (largest / zero) ** 0.11  # sizes closer than that have a tick, but no room for its label
    labelled: list[int] = []
    for size in reversed(sizes):
        if not labelled or size * apart <= labelled[-1]:
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
    colour = COLOURS[rows[0].method]
    means, stds = [row.mean(figure) for row in rows], [row.std(figure) for row in rows]
    style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5, "capsize": 3, "linewidth": 1.3}
    axes.errorbar([row.size or zero for row in rows], means, stds, label=label, linestyle=line, **style)
    if rows[0].size == 0 and line:
        axes.axhline(means[0], color=colour, linestyle=line, linewidth=1)
        if not math.isnan(stds[0]):
            axes.axhspan(means[0] - stds[0], means[0] + stds[0], color=colour, alpha=0.12, linewidth=0)


def courses(rows: Sequence[Row]) -> list[curves.Course]:
    """The rows' runs as curves over epochs, of those runs whose folders are here."""
    found = []
    for row in rows:
        folders = [Path(run.directory) for run in row.runs if run.directory]
        here = tuple(folder for folder in folders if (folder / METRICS).is_file())
        if here:
            epochs = int(row.runs[0].params["epochs"])
            found.append(curves.Course(row.label, row.size, COLOURS[row.method], epochs, here))
    return found


def write(rows: Sequence[Row], notes: Sequence[str], experiment: str, out: Path) -> list[Path]:
    """Writes table.md, table.csv, table.json, plot.png, plot.svg, and curves.png where there are any; returns paths."""
    from matplotlib import rc_context

    out.mkdir(parents=True, exist_ok=True)
    header, *body = table(rows)
    lines = [header, ["---"] * len(header), *body]
    markdown = [f"# {experiment}", "", caption(rows), "", *(f"| {' | '.join(line)} |" for line in lines), ""]
    (out / "table.md").write_text("\n".join([*markdown, *(f"- {note}" for note in notes)]) + "\n")

    numbers = records(rows)
    with (out / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(numbers[0]))
        writer.writeheader()
        writer.writerows(numbers)
    runs = [{"runs": [run.run_id for run in row.runs]} for row in rows]
    result = {
        "experiment": experiment,
        "rows": [one | two for one, two in zip(numbers, runs, strict=True)],
        "notes": list(notes),
    }
    (out / "table.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")

    paths = [out / name for name in ("table.md", "table.csv", "table.json", "plot.png", "plot.svg")]
    with rc_context({"font.size": 9, "svg.hashsalt": experiment}):  # the same runs, the same bytes
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
    shown = Table(title=title, caption=caption(rows), box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column(header[0], overflow="fold")
    for name in header[1:]:
        shown.add_column(name, justify="right")
    for line in body:
        shown.add_row(*line)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(shown)
    for note in notes:
        console.print(f"note: {note}", markup=False, highlight=False)


@dataclass(frozen=True)
class Arguments:
    experiment: str
    sweep: str
    out: str
    tracking: str


def parse(arguments: Sequence[str]) -> Arguments:
    """Reads ``key=value`` arguments; exactly one of ``experiment`` and ``sweep`` is not empty.

    Raises:
        UsageError: a key is unknown, a value impossible, or it is not said what to report on.
    """
    given: dict[str, str] = dict(argument.partition("=")[::2] for argument in arguments)
    for key in given.keys() - {"experiment", "sweep", "out", "tracking"}:
        raise UsageError(f"{key}: unknown key; there are experiment=NAME, sweep=ID, out=DIR and tracking=mlflow|jsonl")
    parsed = Arguments(**{"experiment": "", "sweep": "", "out": "", "tracking": "mlflow"} | given)
    if bool(parsed.experiment) == bool(parsed.sweep):
        raise UsageError("name one of experiment=NAME and sweep=ID to report on")
    if parsed.tracking not in ("mlflow", "jsonl"):
        raise UsageError(f"tracking={parsed.tracking}: choose one of mlflow, jsonl")
    return parsed


def main(arguments: Sequence[str]) -> None:
    """Prints the table, and writes it and the plot.

    Raises:
        UsageError: an argument is wrong, or there is no such experiment, or no finished run in it.
    """
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    asked = parse(arguments)
    if asked.sweep:
        name, runs = read_sweep(asked.sweep, asked.tracking)
    else:
        name, runs = asked.experiment, read_runs(asked.experiment, asked.tracking)
    rows, notes = summarise(runs)
    if not rows:
        raise UsageError(f"{name}: no run has finished ({'; '.join(notes)}); train one first")
    out = Path(asked.out or f"results/{name}")
    write(rows, notes, name, out)

    show(rows, notes, name)
    print(f"table: {out / 'table.md'} (also .csv, .json)")
    print(f"plot: {out / 'plot.png'} (also .svg)")
    if asked.tracking == "mlflow":
        print(f"compare the runs in a browser: mlflow ui    ({name} at http://127.0.0.1:5000)")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UsageError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
