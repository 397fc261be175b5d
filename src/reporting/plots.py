"""Plots of support-set size against accuracy, the gain over the control, and the fraction of right positives.

They have a line for each method and variant or, with many variants, a dot for each row.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence, Sized
from itertools import pairwise
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from src.config.names import COLOURS, UNTRAINED, title_of
from src.reporting.rows import (
    ACCURACY,
    GAIN,
    RANKING,
    RIGHT_POSITIVES,
    TableRow,
    control_of,
    difference,
    metrics_of,
)
from src.system.atomic_write import write_whole

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend
    from matplotlib.lines import Line2D

AXES = {
    ACCURACY: "Test linear top-1 accuracy (%)",
    GAIN: "Gain over the control (points;\npaired by seed, 95% intervals)",
    RIGHT_POSITIVES: "Right positives of\nvalidation images (%)",
}
MIN_SPAN = 1.0  # percentage points; on a shorter axis, one image more or less would fill the panel
MARKERS = {"simclr": "D", "nothing_stored": "s", "nnclr": "o", "kmclr": "v"}
SPARE_MARKERS = "^P*X"
LINES = ("-", "--", ":", "-.")  # for the variants of a method
FURTHER_MARKERS = "d>p"  # for the third and later variants of a method; no method has them for its first
MAX_LINES = 2 * len(LINES)  # series; with more, each row is drawn as a dot
MAX_DOTS = 80  # rows, the most accurate ones
MAX_LABEL_CHARS = 60  # of a dot's label
LEVEL_OF_CONTROLS: dict[str, Any] = {"color": COLOURS["nothing_stored"], "linewidth": 1, "zorder": 1}
TOLD = "told: "  # prefix of the id of a mark that has a text of its own (`tell`)


def plot(rows: Sequence[TableRow]) -> Figure:
    """Plot lines over the support-set size if there are few variants, or else a dot for each row.

    The untrained encoder is left out: its accuracy is so low that the others would look alike.
    """
    rows = [row for row in rows if row.method != UNTRAINED]
    return dots(rows) if len({row.label for row in rows}) > MAX_LINES else by_size(rows)


class Point(NamedTuple):
    """What a panel shows of a row."""

    value: float
    bar: float  # half the length of the error bar: a standard deviation, or half a 95% interval; NaN: unknown
    seeds: int
    text: str


def panels_of(rows: Sequence[TableRow], controls: Sequence[TableRow | None]) -> dict[str, dict[int, Point]]:
    """What each panel shows: the points of the rows that have one, by their places in ``rows``.

    There is a panel of gains over the controls if the interval of any gain is known, and one of right positives if any
    run has measured them.

    Args:
        rows: of the report.
        controls: the control of each row; None: the row has none.
    """
    panels: dict[str, dict[int, Point]] = {
        metric: {
            place: Point(row.mean(metric), row.std(metric), len(row.values(metric)), row.text(metric))
            for place, row in enumerate(rows)
            if row.values(metric)
        }
        for metric in (ACCURACY, RIGHT_POSITIVES)
    }
    gains = [difference(row, control, ACCURACY) for row, control in zip(rows, controls, strict=True)]
    known = any(math.isfinite(gain.half_width) for gain in gains)
    panels[GAIN] = {
        place: Point(gain.mean, gain.half_width, gain.pairs, gain.text)
        for place, gain in enumerate(gains)
        if known and gain.pairs
    }
    return {metric: panels[metric] for metric in AXES if panels[metric] or metric == ACCURACY}


def caption(rows: Sequence[TableRow]) -> str:
    """A line that says what all runs have in common, how many seeds a row has, and what the ± means."""
    runs = [run for row in rows for run in row.runs]
    parts = []
    texts = {"data.name": "{}", "data.limit": "{} training images", "backbone.name": "{}", "epochs": "{} epochs"}
    for key, text in texts.items():
        values = {run.params.get(key) for run in runs}
        if len(values) == 1 and (value := values.pop()):
            said = f"{int(value):,}" if value.isdigit() else title_of(value)
            parts.append("1 epoch" if (key, value) == ("epochs", "1") else text.format(said))
    fewest, most = (pick(len(row.runs) for row in rows) for pick in (min, max))
    seeds = f"{most} seeds" if fewest == most else f"{fewest} to {most} seeds"
    parts.append(f"mean ± standard deviation over {seeds}" if most > 1 else "one seed")
    return ", ".join(parts)


def _without_bars(panels: Mapping[str, Mapping[int, Point]]) -> str:
    bars = {math.isnan(point.bar) for points in panels.values() for point in points.values()}
    return " (no bar: one seed)" if len(bars) > 1 else ""


def by_size(rows: Sequence[TableRow]) -> Figure:
    """Draw a panel for each metric and a line for each method and variant, horizontal if it stores nothing."""
    from matplotlib.figure import Figure

    series: dict[str, list[TableRow]] = defaultdict(list)
    for row in rows:
        series[row.label].append(row)
    styles = _styles(series)
    panels = panels_of(rows, [control_of(row, rows) for row in rows])
    sizes = sorted({rows[place].size for points in panels.values() for place in points} - {0})
    figure = Figure(figsize=(_width(panels), 3.7), layout="constrained")
    handles: dict[str, Line2D] = {}
    for axes, (metric, points) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True):
        zero, beside = _size_axis(axes, sizes)
        axes.set(ylabel=AXES[metric], xlabel="Support-set size (vectors)")
        frame(axes)
        if metric == GAIN:
            axes.axhline(0, **LEVEL_OF_CONTROLS)
        met: Counter[int] = Counter()
        for label in series:
            drawn = []
            for row, point in ((rows[place], point) for place, point in points.items() if rows[place].label == label):
                # Rows of one size stand beside each other.
                alike = sum(any(other.size == row.size for other in each) for each in series.values())
                drawn.append(((row.size or zero) * beside ** (met[row.size] - (alike - 1) / 2), row, point))
                met[row.size] += 1
            if drawn:
                handles.setdefault(label, _series(axes, drawn, metric, styles[label]))
        _cap(axes)
    figure.suptitle(fitting(caption(rows) + _without_bars(panels), figure), fontsize=9)
    if handles:
        legend_below(figure, handles)
    return figure


def legend_below(figure: Figure, handles: Mapping[str, Artist]) -> Legend:
    """Draw one legend for all panels, below them, in as many columns as the names leave room for."""
    letters = int(12.2 * figure.get_figwidth())  # of a line in the legend
    names = [wrapped(label, letters) for label in handles]
    longest = max(len(line) for name in names for line in name.split("\n"))
    columns = min(4, len(names), max(1, (letters + 8) // (longest + 8)))
    return figure.legend(list(handles.values()), names, loc="outside lower center", ncols=columns, frameon=False)


def dots(rows: Sequence[TableRow]) -> Figure:
    """Draw a dot for each row with its deviation; vertical lines are the controls.

    The rows are in the order of their accuracy on the validation images, the best at the top.
    """
    from matplotlib.figure import Figure

    measured = [row for row in rows if row.values(ACCURACY)]
    ranked_by = RANKING if all(row.values(RANKING) for row in measured) else ACCURACY
    measured.sort(key=lambda row: row.mean(ranked_by))
    found = measured[-MAX_DOTS:]
    controls = [control_of(row, rows) for row in found]
    shown = panels_of(found, controls)
    figure = Figure(figsize=(_width(shown), 1.1 + 0.165 * len(found)), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False).flat
    for axes, (metric, points) in zip(panels, shown.items(), strict=True):
        if metric == GAIN:
            axes.axvline(0, **LEVEL_OF_CONTROLS)
        for place, row in enumerate(found):
            if not (point := points.get(place)):
                continue
            style: dict[str, Any] = {"color": row.colour, "marker": marker_of(row.method), "markersize": 4.5}
            error = None if math.isnan(point.bar) else point.bar
            style |= {"capsize": 2, "linewidth": 1, "linestyle": "none"}
            drawn = axes.errorbar(point.value, place, xerr=error, **style)
            drawn[0].set_clip_on(False)
            tell(drawn[0], _reading(row, metric, point))
            if metric != GAIN and (control := controls[place]) and control.values(metric):
                # A piece as high as the row, so that rows of one control have one line.
                ends = [place - 0.5, place + 0.5]
                axes.plot([control.mean(metric)] * 2, ends, color=control.colour, linewidth=1, zorder=0)
        axes.set(xlabel=AXES[metric], ylim=(-0.8, len(found) - 0.2))
        _cap(axes, "x")
        frame(axes, "x")
        axes.grid(axis="y", color="0.94", linewidth=0.6)
    panels[0].set_yticks(range(len(found)), [_cut(row.title) for row in found], fontsize=7)
    for label, row in zip(panels[0].get_yticklabels(), found, strict=True):
        label.set_color(row.colour)
    for axes in panels:
        axes.tick_params(axis="y", length=0)
    left_out = f"; the {MAX_DOTS} best of {len(measured)}" if len(measured) > MAX_DOTS else ""
    levels = "; grey lines: the same with nothing stored" if any(controls) else ""
    figure.suptitle(fitting(f"{caption(rows)}{_without_bars(shown)}{left_out}{levels}", figure), fontsize=9)
    return figure


def tell(mark: Artist, text: str) -> None:
    """Set the text that a browser shows while the pointer is on a mark of `to_svg`."""
    mark.set_gid(TOLD + text)


def write_png(figure: Figure, path: Path, dpi: int) -> None:
    """Write the figure whole or not at all: on a full disk the file that was there stays."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    write_whole(path, drawn.getvalue())


def write_pdf(figure: Figure, path: Path) -> None:
    """Write the figure for LaTeX, which takes no SVG; without a date, so that equal figures give equal bytes."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="pdf", metadata={"CreationDate": None})
    write_whole(path, drawn.getvalue())


def to_svg(figure: Figure) -> str:
    """The figure as SVG, in which the text of `tell` is a mark's ``<title>``."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    # Matplotlib writes the id escaped, within double quotes unless it has some itself.
    return re.sub(rf'<g id=(["\']){TOLD}(.*?)\1>', r"<g><title>\2</title>", drawn.getvalue(), flags=re.DOTALL)


def _reading(row: TableRow, metric: str, point: Point) -> str:
    seeds = f"{point.seeds} seeds" if point.seeds > 1 else "one seed"
    return f"{row.title}: {GAIN if metric == GAIN else metrics_of([row])[metric]} {point.text}, {seeds}"


def _width(panels: Sized) -> float:
    """A figure's width in inches."""
    return max(7.2, 2.4 + 2.4 * len(panels))


def marker_of(method: str) -> str:
    """A method's marker, the same in every plot."""
    return MARKERS.get(method, SPARE_MARKERS[sum(method.encode()) // 4 % len(SPARE_MARKERS)])


def frame(axes: Axes, grid: str = "y") -> None:
    """Draw two spines, and a light grid behind the data."""
    axes.grid(axis=grid, color="0.9", linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def wrapped(text: str, width: int) -> str:
    """Wrap a text to at most two lines of ``width`` characters; the rest is cut off."""
    return "\n".join(wrap(text, width, max_lines=2, placeholder="…"))


def fitting(title: str, figure: Figure) -> str:
    """Wrap the title of a figure to two lines if it is wider than the figure."""
    return wrapped(title, int(14 * figure.get_figwidth()))


def _cut(text: str) -> str:
    return text if len(text) <= MAX_LABEL_CHARS else f"{text[: MAX_LABEL_CHARS - 1].rstrip(' ,')}…"


def _styles(series: Mapping[str, Sequence[TableRow]]) -> dict[str, dict[str, Any]]:
    """The variants of a method have its colour, and differ in line, marker and whether the marker is hollow."""
    seen: Counter[str] = Counter()
    styles: dict[str, dict[str, Any]] = {}
    for label, rows in series.items():
        row, variant = rows[0], seen[rows[0].method]
        seen[row.method] += 1
        markers = marker_of(row.method) + FURTHER_MARKERS
        fill = "white" if variant % 2 else row.colour
        marker = markers[variant // 2 % len(markers)]
        styles[label] = {"color": row.colour, "marker": marker, "markerfacecolor": fill}
        styles[label] |= {"linestyle": LINES[variant % len(LINES)], "markersize": 5, "linewidth": 1.3}
    return styles


def _size_axis(axes: Axes, sizes: Sequence[int]) -> tuple[float, float]:
    """Make the axis logarithmic, with 0 at its left behind a break, and label each size.

    Returns:
        The place of 0, and the factor between two rows of one size that are drawn beside each other.
    """
    smallest, largest = (sizes[0], sizes[-1]) if sizes else (1, 1)
    zero = smallest / max(3.0, (largest / smallest) ** 0.2)
    width = largest / zero
    is_crowded = any(right / left < width ** (0.02 * len(f"{left:,}{right:,}")) for left, right in pairwise(sizes))
    upright: dict[str, Any] = {"rotation": 90, "fontsize": 8} if is_crowded else {}
    labelled: list[int] = []
    for size in reversed(sizes):  # even upright labels need a line's height
        if not labelled or size * width ** (0.049 if is_crowded else 0) <= labelled[-1]:
            labelled.append(size)
    margin = width**0.07
    axes.set_xscale("log")
    axes.set_xlim(zero / margin, largest * margin)
    axes.set_xticks([zero, *labelled], ["0", *(f"{size:,}" for size in labelled)], **upright)
    axes.set_xticks(sizes, minor=True, labels=[""] * len(sizes))
    for side in (-1, 1) if sizes else ():
        middle = (zero * smallest) ** 0.5 * margin ** (side * 0.15)
        slash = [(-0.5, -1), (0.5, 1)]
        transform = axes.get_xaxis_transform()
        axes.plot([middle], [0], transform=transform, marker=slash, markersize=9, color="black", clip_on=False)
    return zero, width**0.025


def _series(
    axes: Axes, points: Sequence[tuple[float, TableRow, Point]], metric: str, style: Mapping[str, Any]
) -> Line2D:
    """Draw the rows of a series, each at its place, joined by a line if they store something.

    Returns:
        The legend's handle.
    """
    from matplotlib.lines import Line2D

    stored = [(place, point.value) for place, row, point in points if row.size]
    levels = [point for _, row, point in points if not row.size and metric != GAIN]
    for place, row, point in points:
        error = None if math.isnan(point.bar) else point.bar
        single = dict(style) | {"linestyle": "none"}
        drawn = axes.errorbar(place, point.value, error, capsize=3, elinewidth=1.2, label=row.title, **single)
        drawn[0].set_clip_on(False)  # a marker at 100% is a whole one
        tell(drawn[0], _reading(row, metric, point))
    if len(stored) > 1:
        axes.plot(*zip(*stored, strict=True), **dict(style) | {"marker": "", "label": points[0][1].label})
    for point in levels:
        axes.axhline(point.value, color=style["color"], linestyle=style["linestyle"], linewidth=1, zorder=1)
        if not math.isnan(point.bar):
            low, high = (point.value + side * point.bar for side in (-1, 1))
            axes.axhspan(low, high, color=style["color"], alpha=0.1, linewidth=0, zorder=0)
    has_line = len(stored) > 1 or levels
    return Line2D([], [], **dict(style) | ({} if has_line else {"linestyle": "none"}))


def _cap(axes: Axes, along: Literal["x", "y"] = "y") -> None:
    """Make an axis of accuracies at least `MIN_SPAN` long, and let it end at 100% or before."""
    low, high = axes.get_ylim() if along == "y" else axes.get_xlim()
    if high - low < MIN_SPAN:
        high = min(high + (MIN_SPAN - high + low) / 2, 100.0)
        low = high - MIN_SPAN
    axes.set(**{f"{along}lim": (low, min(high, 100.0) if low < 100 else high)})
