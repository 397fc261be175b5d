"""Training curves as pictures: one run's, and those of a report's rows beside each other."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from src.config.names import COLOURS, UNTRAINED
from src.runs.record import METRICS, read_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A panel's title, and what it shows.
PANELS = {
    "loss": ("train/loss",),
    "validation accuracy (%)": ("val/knn_top1", "val/online_top1"),
    "nearest entries": ("support/label_agreement", "support/self_hit"),
    "entries in use": ("support/perplexity", "support/dead"),
}
# What is compared over the epochs, and what a value is multiplied by.
COMPARED = {
    "val/knn_top1": ("kNN accuracy on validation images (%)", 1),
    "support/label_agreement": ("nearest stored vector of the same class (%)", 100),
}
LINES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)))
MARKERS = ("", "o", "s", "^", "D")  # once the lines of a colour are used up
LEGEND_WIDTH = 88  # characters that fit beside each other below a figure of 7.2 inches


class Course(NamedTuple):
    """Runs that differ only in their seed: a name, how many vectors they store, a colour, epochs, directories."""

    name: str
    size: int
    colour: str
    epochs: int
    directories: tuple[Path, ...]
    is_untrained: bool = False  # the runs' encoder before the first step, which is a level and no curve


def read(directory: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Each metric's steps and values, from the run's ``metrics.jsonl``."""
    curves: dict[str, tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))
    for row in sorted(read_rows(directory / METRICS)[0], key=lambda row: row["step"]):
        for key, value in row["metrics"].items():
            curves[key][0].append(row["step"])
            curves[key][1].append(value)
    return dict(curves)


def plot(directory: Path) -> Path:
    """Draw ``curves.png`` into the run's directory."""
    from matplotlib.figure import Figure

    curves = read(directory)
    figure = Figure(figsize=(9, 6), layout="constrained")
    for axes, (title, keys) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for key, style in zip(keys, ("-", "--"), strict=False):
            axes.plot(*curves.get(key, ([], [])), style, label=key.split("/")[1])
        if level := curves.get(f"{UNTRAINED}/{keys[0]}"):
            axes.axhline(level[1][-1], color=COLOURS[UNTRAINED], label=f"{keys[0].split('/')[1]}, untrained")
        axes.set(title=title, xlabel="step")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    path = directory / "curves.png"
    figure.savefig(path, dpi=120)
    return path


def over_epochs(course: Course, metric: str) -> list[tuple[float, float, float]]:
    """Epoch, mean and sample standard deviation (0 for one run) of a metric, where every run has it.

    Of the untrained encoder it is a level over all epochs.
    """
    runs = [read(directory) for directory in course.directories]
    metric = f"{UNTRAINED}/{metric}" if course.is_untrained else metric
    found: dict[float, list[float]] = defaultdict(list)
    for run in runs:
        last = max((step for steps, _ in run.values() for step in steps), default=0) or 1
        for step, value in zip(*run.get(metric, ([], [])), strict=True):
            found[course.epochs * step / last].append(value)
    points = [
        (epoch, statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
        for epoch, values in sorted(found.items())
        if len(values) == len(runs)
    ]
    return [*points, *((course.epochs, mean, std) for _, mean, std in points)] if course.is_untrained else points


def legend_columns(labels: Iterable[str]) -> int:
    """As many as fit, three at most."""
    return max(1, min(3, LEGEND_WIDTH // (max(map(len, labels), default=1) + 8)))


def compare(courses: Sequence[Course]) -> Figure:
    """A panel a metric, a line a course in a band of its deviation over seeds."""
    from matplotlib.figure import Figure

    columns = legend_columns(course.name for course in courses)
    figure = Figure(figsize=(7.2, 3.3 + 0.2 * math.ceil(len(courses) / columns)), layout="constrained")
    panels = figure.subplots(1, len(COMPARED))
    for axes, (metric, (title, factor)) in zip(panels, COMPARED.items(), strict=True):
        places: Counter[str] = Counter()
        for course in courses:
            round_, place = divmod(places[course.colour], len(LINES))
            places[course.colour] += 1
            if metric.startswith("support/") and not course.size:
                continue
            points = over_epochs(course, metric)
            epochs, means = [epoch for epoch, _, _ in points], [factor * mean for _, mean, _ in points]
            band = [[factor * (mean + side * std) for _, mean, std in points] for side in (-1, 1)]
            style: dict[str, Any] = {"color": course.colour, "linestyle": LINES[place], "linewidth": 1.3}
            style |= {"marker": MARKERS[round_ % len(MARKERS)], "markersize": 3}
            axes.plot(epochs, means, label=course.name, **style)
            axes.fill_between(epochs, *band, color=course.colour, alpha=0.12, linewidth=0)
        axes.set(title=title, xlabel="epoch")
        axes.title.set_size("medium")
        axes.grid(axis="y", color="0.9", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, handlelength=3.5)
    return figure
