"""Training curves as pictures: one run's, and those of a report's rows beside each other."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from src.config.names import COLOURS, UNTRAINED
from src.reporting.plots import LINES, frame, legend_below, tell, write_png
from src.reporting.rows import RIGHT_POSITIVES
from src.runs.metrics_file import read_rows
from src.runs.record import CURVES, METRICS

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curves = dict[str, tuple[list[int], list[float]]]  # each metric's steps and values

NEIGHBOUR = "support/neighbour_agreement"
# The panels of a run's picture by title; for each, its metrics and their names in the legend.
PANELS = {
    "loss": {"train/loss": "loss"},
    "validation accuracy (%)": {"val/knn_top1": "kNN", "val/online_top1": "online linear classifier"},
    "right positives (%)": {RIGHT_POSITIVES: "of validation images"},
    "nearest entries (share)": {
        NEIGHBOUR: "of the anchor's class, if of another image",
        "support/self_hit": "of its own image",
    },
    "entries in use (number)": {"support/perplexity": "perplexity", "support/dead": "never the nearest"},
}
# Metrics that are compared over the epochs: title, and the factor from the logged value to the drawn one.
COMPARED = {
    "val/knn_top1": ("kNN accuracy on\nvalidation images (%)", 1),
    RIGHT_POSITIVES: ("right positives of\nvalidation images (%)", 1),
    NEIGHBOUR: ("right positives among those\nfrom other images (%)", 100),
    "support/self_hit": ("nearest entry is of\nthe anchor's own image (%)", 100),
}
MAX_COURSES_IN_PANEL = 5  # with more, each method has a column of panels
MAX_NAMED_COURSES = 6  # of a method; with more, all but the best are thin lines without a name
MAX_NAME_CHARS = 24  # of the name of a method's best course
MIN_SELF_HITS = 0.005  # of lookups; self-hits that never reach this fraction are not drawn
MIN_UNMARKED_POINTS = 12  # a curve with fewer points has markers


class Point(NamedTuple):
    """A metric at an epoch: the mean over runs, and the sample standard deviation (0 for one run)."""

    epoch: float
    mean: float
    std: float


class Course(NamedTuple):
    """Runs that differ only in their seed, which are drawn as one curve."""

    title: str
    method: str
    size: int  # stored vectors
    colour: str
    epochs: int
    directories: tuple[Path, ...]
    cycle: int = 1  # epochs from one reset of the support set to the next
    is_untrained: bool = False  # the encoder before the first step, drawn as a level
    has_queue: bool = False  # stores single embeddings, and no prototypes


def read(directory: Path) -> Curves:
    """Read each metric's steps and values from the run's ``metrics.jsonl``, and add the `neighbour_agreement`."""
    curves: Curves = defaultdict(lambda: ([], []))
    for row in sorted(read_rows(directory / METRICS)[0], key=lambda row: row["step"]):
        for key, value in (row["metrics"] | neighbour_agreement(row["metrics"])).items():
            curves[key][0].append(row["step"])
            curves[key][1].append(value)
    return dict(curves)


def neighbour_agreement(metrics: Mapping[str, float]) -> dict[str, float]:
    """Among nearest entries that are not of the anchor's own image, the fraction that are of the anchor's class.

    An entry of the anchor's own image always has the anchor's class, and so says nothing about the quality of
    neighbours. If the support set does not know which images its entries are of, the result is empty.
    """
    agreement, own = metrics.get("support/label_agreement"), metrics.get("support/self_hit")
    if agreement is None or own is None or not own < 1:
        return {}
    return {NEIGHBOUR: max(0.0, agreement - own) / (1 - own)}


def plot(directory: Path) -> Path:
    """Draw ``curves.png`` into the run's directory: a panel for everything that the run has measured."""
    from matplotlib.figure import Figure

    curves = read(directory)
    if RIGHT_POSITIVES in curves:
        curves.pop(NEIGHBOUR, None)  # because it flatters prototypes
    if max(curves.get("support/self_hit", ([], [0.0]))[1]) < MIN_SELF_HITS:
        curves.pop("support/self_hit", None)
    shown = {title: keys for title, keys in PANELS.items() if curves.keys() & keys.keys()}
    rows, columns = max(1, math.ceil(len(shown) / 2)), 2 if len(shown) > 1 else 1
    figure = Figure(figsize=(4.2 * columns, 3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes in list(panels)[len(shown) :]:
        axes.remove()
    for axes, (title, keys) in zip(figure.axes, shown.items(), strict=True):
        measured = {key: name for key, name in keys.items() if key in curves}
        for (key, name), style in zip(measured.items(), ("-", "--"), strict=False):
            steps, values = curves[key]
            marker = "o" if len(steps) < MIN_UNMARKED_POINTS else ""
            axes.plot(steps, values, style, marker=marker, markersize=3, label=name)
        first = next(iter(keys))
        if level := curves.get(f"{UNTRAINED}/{first}"):
            axes.axhline(level[1][-1], color=COLOURS[UNTRAINED], label=f"{keys[first]}, untrained")
        axes.set(title=title, xlabel="step")
        axes.title.set_fontsize("medium")
        axes.legend(frameon=False, fontsize="small")
        frame(axes)
    figure.suptitle(directory.name, fontsize="medium")
    path = directory / CURVES
    write_png(figure, path, dpi=120)
    return path


def over_epochs(course: Course, metrics: Iterable[str]) -> dict[str, list[Point]]:
    """Points of metrics, at epochs where every run has the metric.

    A metric of the untrained encoder is a level over all epochs. Metrics of a support set that is reset are taken at
    the last epoch before each reset, where the set is oldest; if none was measured there, all points are taken.
    """
    prefix = f"{UNTRAINED}/" if course.is_untrained else ""
    found: dict[str, dict[float, list[float]]] = {metric: defaultdict(list) for metric in metrics}
    for directory in course.directories:
        run = read(directory)
        last = max((step for steps, _ in run.values() for step in steps), default=0) or 1
        for metric, values in found.items():
            for step, value in zip(*run.get(prefix + metric, ([], [])), strict=True):
                values[course.epochs * step / last].append(value)
    return {metric: _points(course, metric, values) for metric, values in found.items()}


def _points(course: Course, metric: str, found: Mapping[float, Sequence[float]]) -> list[Point]:
    """The points of one metric, of which ``found`` has the runs' values at each epoch."""
    points = [
        Point(epoch, statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
        for epoch, values in sorted(found.items())
        if len(values) == len(course.directories)
    ]
    if course.is_untrained:
        return [*points, *(point._replace(epoch=course.epochs) for point in points)]
    if metric.startswith((RIGHT_POSITIVES, "support/")) and course.cycle > 1:
        # At epoch 0 a run has prototypes only if it started from another run's weights, and they are of that run.
        return [point for point in points if point.epoch and not round(point.epoch) % course.cycle] or points
    return points


def compare(courses: Sequence[Course]) -> Figure | None:
    """Draw a panel for each metric; with more than a few courses, draw a grid of metrics and storing methods.

    In the grid, courses that store nothing are in every column. If a method has many courses, only the best has a name:
    the one with the highest last kNN accuracy on validation images.

    Returns:
        The figure; None if nothing was measured over the epochs, as with ``data.final`` or ``epochs=0``.
    """
    from matplotlib.figure import Figure

    measured = {course: _worth_drawing(course) for course in courses}
    drawn = {metric: {each: p for each in courses if (p := measured[each].get(metric))} for metric in COMPARED}
    if drawn[NEIGHBOUR].keys() <= drawn[RIGHT_POSITIVES].keys():
        drawn[NEIGHBOUR] = {}  # it serves only for older runs, which lack the other
    metrics = [metric for metric, each in drawn.items() if each]
    if not metrics or not any(course.epochs for course in courses):
        return None
    styles = _styles(courses, {each: points[-1][1] for each, points in drawn["val/knn_top1"].items()})
    methods = list(dict.fromkeys(course.method for course in courses if course.size))
    if len(courses) > MAX_COURSES_IN_PANEL and methods:
        controls = [course for course in courses if not course.size]
        groups = [controls + [each for each in courses if each.size and each.method == method] for method in methods]
        cells = [[(metric, group) for group in groups] for metric in metrics]
    else:
        methods, cells = [], [[(metric, list(courses)) for metric in metrics]]
    rows, columns = len(cells), len(cells[0])
    figure = Figure(figsize=(max(4.0, 3.5 * columns), 0.4 + 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, max(1, columns), squeeze=False, sharey="row" if methods else False)
    for line, some in zip(panels, cells, strict=True):
        is_first = True
        for axes, (metric, group) in zip(line, some, strict=True):
            title, factor = COMPARED[metric]
            shown = [each for each in group if each in drawn[metric]]
            if not shown:
                axes.remove()
                continue
            _panel(axes, shown, drawn[metric], factor, styles)
            axes.set_xlim(0, 1.05 * max(course.epochs for course in courses))
            if is_first or not methods:
                axes.set_ylabel(title)
                axes.tick_params(labelleft=True)
            is_first = False
    named: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    if named:
        legend = legend_below(figure, named)
        figure.set_figheight(figure.get_figheight() + legend.get_window_extent().height / figure.dpi)
    for axes, method in zip(panels[0], methods, strict=False):
        axes.set_title(method, fontsize="medium")
    return figure


def _worth_drawing(course: Course) -> dict[str, list[Point]]:
    """The points of `over_epochs` without metrics of a support set that stores nothing, and without rare self-hits.

    The `neighbour_agreement` is of queues only: it counts a prototype as right if the commonest class among its members
    is the anchor's, which flatters prototypes beside a queue.
    """
    found = over_epochs(course, [each for each in COMPARED if course.size or not each.startswith("support/")])
    if not course.has_queue:
        found.pop(NEIGHBOUR, None)
    own = found.get("support/self_hit", [])
    if all(point.mean < MIN_SELF_HITS for point in own):
        found.pop("support/self_hit", None)
    return found


def _styles(courses: Sequence[Course], accuracy: Mapping[Course, float]) -> dict[Course, dict[str, Any]]:
    """Choose the lines' styles: if a method has many courses, all but the best are faint.

    Of a few courses, those with larger support sets have fuller colours, and those that store nothing differ in dashes.
    """
    by_method: dict[str, list[Course]] = defaultdict(list)
    for course in sorted(courses, key=lambda each: each.size):
        by_method[course.method].append(course)
    styles: dict[Course, dict[str, Any]] = {}
    for method, some in by_method.items():
        best = max(some, key=lambda each: accuracy.get(each, -1.0))
        for place, course in enumerate(some):
            if len(some) <= MAX_NAMED_COURSES:
                look = (
                    {"color": _shade(course.colour, (place + 1) / len(some))}
                    if course.size
                    else {"color": course.colour, "linestyle": LINES[place % len(LINES)]}
                )
                styles[course] = look | {"label": course.title}
            elif course == best:
                title = course.title if len(course.title) < MAX_NAME_CHARS else method
                styles[course] = {"color": course.colour, "label": f"{title}, best kNN of {len(some)}", "zorder": 3}
            else:
                styles[course] = {"color": course.colour, "alpha": 0.35, "linewidth": 0.7}
    return styles


def _panel(
    axes: Axes,
    courses: Sequence[Course],
    points_of: Mapping[Course, Sequence[Point]],
    factor: float,
    styles: Mapping[Course, Mapping[str, Any]],
) -> None:
    for course in courses:
        points, style = points_of[course], styles[course]
        epochs, means = [epoch for epoch, _, _ in points], [factor * mean for _, mean, _ in points]
        marker = "o" if len(points) < MIN_UNMARKED_POINTS and ("label" in style or len(points) == 1) else ""
        usual: dict[str, Any] = {"linewidth": 1.5, "marker": marker, "markersize": 3}
        (line,) = axes.plot(epochs, means, **usual | dict(style))
        tell(line, f"{course.title}: {means[-1]:.2f} at epoch {epochs[-1]:g}")
        if "label" in style:
            low, high = ([factor * (mean + side * std) for _, mean, std in points] for side in (-1, 1))
            if len(points) > 1:
                axes.fill_between(epochs, low, high, color=style["color"], alpha=0.12, linewidth=0)
            else:  # a band would have no width
                axes.vlines(epochs, low, high, color=style["color"], linewidth=1)
    axes.set(xlabel="epoch")
    axes.locator_params(axis="x", integer=True)
    frame(axes)


def _shade(colour: str, fraction: float) -> tuple[float, float, float]:
    """Mix a colour with white; with a fraction of 1 it stays as it is."""
    from matplotlib.colors import to_rgb

    weight = 0.35 + 0.65 * fraction
    red, green, blue = (weight * part + 1 - weight for part in to_rgb(colour))
    return red, green, blue
