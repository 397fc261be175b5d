"""Plots of support-set size against accuracy and, beside it, how many of the positives found are of the right class.

They have a line for each method or, with many variants, a dot for each row.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Literal

from src.config.names import UNTRAINED, title_of
from src.reporting.rows import AGREEMENT, TableRow, control_of, metrics_of
from src.system.atomic_write import write_whole

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

ACCURACY = "test/linear_top1"
PLOTTED = {ACCURACY: "Test linear top-1 accuracy (%)", "test/linear_top5": "Test linear top-5 accuracy (%)"}
RIGHT = "Right positives of\nvalidation images (%)"
RANKING = "val/linear_top1"  # the test images choose nothing
MIN_SPAN = 1.0  # percentage points of an axis: with fewer, an image more or less would fill a panel
MARKERS = {"simclr": "D", "nothing_stored": "s", "nnclr": "o", "kmclr": "v"}
SPARE_MARKERS = "^P*X"
LINES = ("-", "--", ":", "-.")  # for the variants of a method
FURTHER_MARKERS = "d>p"  # for the third and later variants of a method; no method has them for its first
MAX_LINES = 2 * len(LINES)  # series; of more each row is drawn as a dot
MAX_DOTS = 80  # the most accurate rows
MAX_LABEL_CHARS = 60  # of a dot's label
MAX_LEGEND_CHARS = 88  # of a line in the legend below the panels
TOLD = "told: "  # prefix of the id of a mark that has a text of its own (`tell`)


def plot(rows: Sequence[TableRow]) -> Figure:
    """Plot accuracy against support-set size if there are few variants, and else a dot for each row.

    The untrained encoder is left out: it is so far below that the others would look alike.
    """
    rows = [row for row in rows if row.method != UNTRAINED]
    return dots(rows) if len({row.label for row in rows}) > MAX_LINES else by_size(rows)


def panels_of(rows: Sequence[TableRow]) -> dict[str, str]:
    """The metrics of the two panels, with the titles of their axes; top-5 where no run knows how many are right."""
    if not any(row.values(AGREEMENT) for row in rows):
        return PLOTTED
    return {ACCURACY: PLOTTED[ACCURACY], AGREEMENT: RIGHT}


def caption(rows: Sequence[TableRow]) -> str:
    """What all runs have in common, how many seeds a row has, and what stands behind ±."""
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


def _without_bars(rows: Sequence[TableRow]) -> str:
    seeds = {len(row.runs) for row in rows}
    return " (no bar: one seed)" if 1 in seeds and len(seeds) > 1 else ""


def by_size(rows: Sequence[TableRow]) -> Figure:
    """Draw a panel for each metric and a line for each method and variant, horizontal if it stores nothing."""
    from matplotlib.figure import Figure

    series: dict[str, list[TableRow]] = defaultdict(list)
    for row in rows:
        series[row.label].append(row)
    styles = _styles(series)
    panels = panels_of(rows)
    sizes = sorted({row.size for row in rows if any(map(row.values, panels))} - {0})
    figure = Figure(figsize=(7.2, 3.7), layout="constrained")
    handles: dict[str, Line2D] = {}
    for axes, (metric, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        zero, beside = _size_axis(axes, sizes)
        axes.set(ylabel=title, xlabel="Support-set size (vectors)")
        frame(axes)
        met: Counter[int] = Counter()
        for label, group in series.items():
            points = [row for row in group if row.values(metric)]
            places = []
            for row in points:  # rows of one size stand beside each other
                alike = sum(any(other.size == row.size for other in each) for each in series.values())
                places.append((row.size or zero) * beside ** (met[row.size] - (alike - 1) / 2))
                met[row.size] += 1
            if points:
                handles[label] = _series(axes, points, places, metric, styles[label])
        _cap(axes)
    figure.suptitle(fitting(caption(rows) + _without_bars(rows), figure), fontsize=9)
    if handles:
        names = [wrapped(label, MAX_LEGEND_CHARS) for label in handles]
        columns = min(4, len(names), max(1, 96 // (max(len(line) for name in names for line in name.split("\n")) + 8)))
        figure.legend(list(handles.values()), names, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def dots(rows: Sequence[TableRow]) -> Figure:
    """Draw a dot for each row with its deviation; vertical lines are the controls.

    The rows are in the order of their accuracy on the validation images, the best at the top.
    """
    from matplotlib.figure import Figure

    measured = [row for row in rows if row.values(ACCURACY)]
    ranked_by = RANKING if all(row.values(RANKING) for row in measured) else ACCURACY
    measured.sort(key=lambda row: row.mean(ranked_by))
    found = measured[-MAX_DOTS:]
    figure = Figure(figsize=(7.2, 1.1 + 0.165 * len(found)), layout="constrained")
    controls = [control_of(row, rows) for row in found]
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (metric, title) in zip(panels, panels_of(rows).items(), strict=True):
        for place, row in enumerate(found):
            if not row.values(metric):  # what stores nothing has no positives to count
                continue
            std = row.std(metric)
            style: dict[str, Any] = {"color": row.colour, "marker": marker_of(row.method), "markersize": 4.5}
            error = None if math.isnan(std) else std
            style |= {"capsize": 2, "linewidth": 1, "linestyle": "none"}
            drawn = axes.errorbar(row.mean(metric), place, xerr=error, **style)
            drawn[0].set_clip_on(False)
            tell(drawn[0], _reading(row, metric))
            if control := controls[place]:  # a piece as high as the row, so that rows of one control have one line
                ends = [place - 0.5, place + 0.5]
                axes.plot([control.mean(metric)] * 2, ends, color=control.colour, linewidth=1, zorder=0)
        axes.set(xlabel=title, ylim=(-0.8, len(found) - 0.2))
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
    figure.suptitle(fitting(f"{caption(rows)}{_without_bars(rows)}{left_out}{levels}", figure), fontsize=9)
    return figure


def tell(mark: Artist, text: str) -> None:
    """Set the text that a browser shows while the pointer is on a mark of `to_svg`."""
    mark.set_gid(TOLD + text)


def write_png(figure: Figure, path: Path, dpi: int) -> None:
    """Write the figure whole or not at all: on a full disk the file that was there stays."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    write_whole(path, drawn.getvalue())


def to_svg(figure: Figure) -> str:
    """The figure as SVG, in which the text of `tell` is a mark's ``<title>``."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    # Matplotlib writes the id escaped, within double quotes unless it has some itself.
    return re.sub(rf'<g id=(["\']){TOLD}(.*?)\1>', r"<g><title>\2</title>", drawn.getvalue(), flags=re.DOTALL)


def _reading(row: TableRow, metric: str) -> str:
    seeds = f"{len(row.values(metric))} seeds" if len(row.values(metric)) > 1 else "one seed"
    return f"{row.title}: {metrics_of([row])[metric]} {row.text(metric)}, {seeds}"


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
    """The title of a figure, in two lines where it is wider than that."""
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
    is_crowded = any(right / left < width ** (0.018 * len(f"{left:,}{right:,}")) for left, right in pairwise(sizes))
    upright: dict[str, Any] = {"rotation": 90, "fontsize": 8} if is_crowded else {}
    labelled: list[int] = []
    for size in reversed(sizes):  # even upright labels need a line's height
        if not labelled or size * width ** (0.043 if is_crowded else 0) <= labelled[-1]:
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
    axes: Axes, rows: Sequence[TableRow], places: Sequence[float], metric: str, style: Mapping[str, Any]
) -> Line2D:
    """Draw the rows of a series, joined by a line if they store something; return the legend's handle."""
    from matplotlib.lines import Line2D

    stored = [(place, row.mean(metric)) for place, row in zip(places, rows, strict=True) if row.size]
    levels = [row for row in rows if not row.size]
    for place, row in zip(places, rows, strict=True):
        error = None if math.isnan(row.std(metric)) else row.std(metric)
        single = dict(style) | {"linestyle": "none"}
        drawn = axes.errorbar(place, row.mean(metric), error, capsize=3, elinewidth=1.2, label=row.title, **single)
        drawn[0].set_clip_on(False)  # a marker at 100% is a whole one
        tell(drawn[0], _reading(row, metric))
    if len(stored) > 1:
        axes.plot(*zip(*stored, strict=True), **dict(style) | {"marker": "", "label": rows[0].label})
    for row in levels:
        axes.axhline(row.mean(metric), color=style["color"], linestyle=style["linestyle"], linewidth=1, zorder=1)
        if not math.isnan(row.std(metric)):
            low, high = (row.mean(metric) + side * row.std(metric) for side in (-1, 1))
            axes.axhspan(low, high, color=style["color"], alpha=0.1, linewidth=0, zorder=0)
    has_line = len(stored) > 1 or levels
    return Line2D([], [], **dict(style) | ({} if has_line else {"linestyle": "none"}))


def _cap(axes: Axes, along: Literal["x", "y"] = "y") -> None:
    """Let an axis of accuracies have `MIN_SPAN` or more, and end at 100%."""
    low, high = axes.get_ylim() if along == "y" else axes.get_xlim()
    if high - low < MIN_SPAN:
        high = min(high + (MIN_SPAN - high + low) / 2, 100.0)
        low = high - MIN_SPAN
    axes.set(**{f"{along}lim": (low, min(high, 100.0) if low < 100 else high)})
