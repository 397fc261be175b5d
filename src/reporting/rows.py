"""Rows of a table: runs that differ only in their seed, what they gain over a control, and notes for the reader."""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from src.config.identity import NEED_STORED_VECTORS, is_protocol
from src.config.names import COLOURS, LABELS, UNTRAINED, colour_of, label_of
from src.reporting.comparison import (
    IN_USE,
    METHOD_PREFIXES,
    ORIGIN,
    compared_settings,
    differing,
    distinguishing,
    name_of,
    row_label,
    select,
    setting_text,
    some_of,
    starts_of,
    usual,
    variant_of,
)
from src.runs.record import (
    TAG_CODE,
    TAG_COLLAPSED,
    TAG_CONDITIONS_CHANGED,
    TAG_DTYPE,
    TAG_EVALUATED,
    TAG_EVALUATION_CHANGED,
    Record,
)

TABLE_METRICS = {
    "val/knn_top1": "val kNN",
    "val/linear_top1": "val linear top-1",
    "test/knn_top1": "test kNN",
    "test/linear_top1": "test linear top-1",
    "test/linear_top5": "test linear top-5",
}
ACCURACY = "test/linear_top1"
RANKING = "val/linear_top1"  # chooses the best row, because the test images must not
RIGHT_POSITIVES = "val/right_positives"
RIGHT_POSITIVES_TITLE = "right positives"
# The metrics of other probes. A suffix, as in `test_fewshot`, says that they were measured after the run's end.
FEWSHOT = re.compile(r"test(_fewshot)?/fewshot_(\d+(?:\.\d+)?(?:e-\d+)?)pct_top1", re.ASCII)
FINETUNE = re.compile(r"test(_finetune)?/finetune_top([15])")
# The linear probe of a teacher's encoder, by other settings, or on other images (src.evaluation.evaluate).
OTHER_LINEAR = re.compile(r"(?:transfer/([^/]+)/)?((?:teacher\w*/)?test\w*)/linear_top1", re.ASCII)
EVALUATED_LATER = ", evaluated later"
GAIN = "gain over control"  # a control has the same settings, but stores nothing
NO_CONTROL = (
    "what storing is worth is unknown, because no row has the same settings with nothing stored: "
    "include runs with support=none, or train them"
)
ROUNDING = 1e-6  # percentage points; one test image more or less is at least a thousand times as much
PEAK = "support/peak_size"  # the metric of a support set whose number of vectors changes
COMPARED_TAGS = (TAG_DTYPE, "git_commit", "git_dirty", "device")  # tags in which runs that are compared should agree


@dataclass(frozen=True)
class TableRow:
    """The runs that differ only in their seed."""

    method: str
    name: str  # the method's name for people
    colour: str
    size: int  # vectors that are stored; if their number changes, those at the end, averaged over the runs
    stored_bytes: int
    variant: str  # "key=value, ..." of the settings that, besides method and size, tell the report's rows apart
    label: str  # the method, and the unusual settings of the variant
    runs: tuple[Record, ...]

    @property
    def is_control(self) -> bool:
        """Whether the row may be the control of others: it stores nothing, and is neither SimCLR nor untrained."""
        stores_nothing = self.runs[0].params.get("support.name") == "none"
        return stores_nothing and self.method not in (UNTRAINED, "simclr")

    @cached_property
    def shared_with_control(self) -> tuple[frozenset[tuple[str, str]], frozenset[tuple[str, str]]]:
        """The settings in which a row and its control agree, once for most methods and once for SimCLR.

        These are all settings but those of the support set. SimCLR's loss has neither a support weight nor a predictor,
        so its control may have any value of these.
        """
        settings = compared_settings(self.runs[0])
        # An objective's name only stands for the settings beside it, and is left out. But if nothing is stored, only
        # the name tells the relation objective from others.
        relation = ("is_relation", str(settings.get("objective.name") == "relation"))
        free = {"k", "queue_size", "seed", "method.name", "objective.name", *NEED_STORED_VECTORS}
        kept = {(key, value) for key, value in settings.items() if key not in free}
        kept = {each for each in kept if not each[0].startswith(("support.", "search."))} | {relation}
        of_simclr = {each for each in kept if each[0] not in ("objective.support_weight", "objective.predictor_hidden")}
        return frozenset(kept), frozenset(of_simclr)

    @property
    def title(self) -> str:
        """The label with the size: ``NNCLR 4,096, support_weight=1``."""
        return (f"{self.name} {self.size:,}" if self.size else self.name) + self.label.removeprefix(self.name)

    def values(self, metric: str) -> list[float]:
        """The metric in every run that has it."""
        return [value for run in self.runs if math.isfinite(value := run.metrics.get(metric, math.nan))]

    def mean(self, metric: str) -> float:
        return statistics.fmean(self.values(metric) or [math.nan])

    def std(self, metric: str) -> float:
        """The sample standard deviation, NaN for fewer than two runs."""
        values = self.values(metric)
        return statistics.stdev(values) if len(values) > 1 else math.nan

    def text(self, metric: str) -> str:
        """Mean and deviation for people: ``57.83 ± 0.33``, without a deviation for one run, and ``-`` for none."""
        mean, std = self.mean(metric), self.std(metric)
        if math.isnan(mean):
            return "-"
        return f"{mean:.2f}" if math.isnan(std) else f"{mean:.2f} ± {std:.2f}"


def cycle_of(row: TableRow) -> int:
    """Epochs from one reset of a row's support sets to the next; 1 where they are never reset."""
    params = row.runs[0].params
    cycle = int(params.get("support.forget_every", 1)) if params.get("support.forget") == "reset" else 1
    return cycle if cycle < int(params["epochs"]) else 1


def metrics_of(rows: Sequence[TableRow]) -> dict[str, str]:
    """The metrics of a table with their titles: `TABLE_METRICS`, and the other known metrics that any run has."""
    found = {key for row in rows for run in row.runs for key in run.metrics}
    few = sorted(filter(None, map(FEWSHOT.fullmatch, found)), key=lambda each: (float(each[2]), each[0]))
    tuned = sorted(filter(None, map(FINETUNE.fullmatch, found)), key=lambda each: (each[2], each[0]))
    others = filter(None, map(OTHER_LINEAR.fullmatch, sorted(found - TABLE_METRICS.keys())))
    titles = {each[0]: f"test {each[2]}% of labels top-1{EVALUATED_LATER if each[1] else ''}" for each in few}
    titles |= {RIGHT_POSITIVES: RIGHT_POSITIVES_TITLE} if RIGHT_POSITIVES in found else {}
    titles |= {each[0]: f"test fine-tuned top-{each[2]}{EVALUATED_LATER if each[1] else ''}" for each in tuned}
    return (
        TABLE_METRICS
        | titles
        | {each[0]: f"{' '.join(filter(None, each.groups())).replace('/', ' ')} linear top-1" for each in others}
    )


class Difference(NamedTuple):
    """A row's metric minus its control's, in percentage points, over the seeds that both have."""

    mean: float
    half_width: float  # of the 95% interval; NaN for fewer than two pairs, or if all differ by the same
    pairs: int

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width

    @property
    def text(self) -> str:
        """For people: ``+0.36 ± 2.13``, without an interval if it is unknown, and ``-`` without a pair."""
        if not self.pairs:
            return "-"
        return f"{self.mean:+.2f}" + ("" if math.isnan(self.half_width) else f" ± {self.half_width:.2f}")


def difference(row: TableRow, control: TableRow | None, metric: str) -> Difference:
    """Mean of the differences between runs of one seed, with its 95% interval by Student's t distribution.

    Without a control there are no pairs.

    Two runs of one seed have the same initial weights, order of images and views. If this makes their metrics vary
    together, the common part cancels in the difference; if not, the interval is wider than it need be, because pairs
    have half the degrees of freedom. The interval assumes that the differences are normal. If all differences are
    equal, as may happen with few test images, they say nothing about the spread, so the interval is unknown.

    Source: Student, "The Probable Error of a Mean", Biometrika 6, 1908.
    """
    pair = row.runs, control.runs if control else ()
    ours, theirs = ({run.params["seed"]: run.metrics.get(metric, math.nan) for run in runs} for runs in pair)
    gains = [gain for seed in ours.keys() & theirs.keys() if math.isfinite(gain := ours[seed] - theirs[seed])]
    if len(gains) < 2 or max(gains) - min(gains) < ROUNDING:
        return Difference(statistics.fmean(gains or [math.nan]), math.nan, len(gains))
    from scipy import stats

    error = statistics.stdev(gains) / math.sqrt(len(gains))
    return Difference(statistics.fmean(gains), float(stats.t.ppf(0.975, len(gains) - 1)) * error, len(gains))


def control_of(row: TableRow, rows: Sequence[TableRow]) -> TableRow | None:
    """Find the row with the same settings that stores nothing; None if there is none, or more than one.

    The two agree in every setting, including those that only one of them has, except those of the support set.
    """
    is_simclr = row.method == "simclr"
    if row.method == UNTRAINED or row.is_control:
        return None
    found = [
        other
        for other in rows
        if other.is_control
        and (other.method == "nothing_stored" or not is_simclr)
        and other.shared_with_control[is_simclr] == row.shared_with_control[is_simclr]
    ]
    return found[0] if len(found) == 1 else None


def summarise(runs: Sequence[Record]) -> tuple[list[TableRow], list[str]]:
    """Group the runs that differ only in their seed into rows.

    Returns:
        The rows, the untrained encoder's first, the others by method, label and support size; and notes on what the
        numbers alone would hide.
    """
    kept, notes = select(runs)
    notes += _changing(kept)
    keys = differing(kept)
    names = distinguishing(kept, keys)
    same: dict[tuple[str, str, int], list[Record]] = defaultdict(list)
    for run in kept:
        same[run.params["method.name"], variant_of(run, names), int(run.params["support_set_size"])].append(run)
    common, starts = usual(kept, keys), starts_of(kept)
    rows = [
        TableRow(
            method,
            name_of(group[0]),
            colour_of(group[0].params),
            round(statistics.fmean(run.metrics.get(IN_USE, size) for run in group)),
            int(group[0].params["support_bytes"]),
            variant,
            row_label(group[0], names, common[method], starts),
            tuple(group),
        )
        for (method, variant, size), group in same.items()
    ]
    order = {method: place for place, method in enumerate(LABELS)}
    rows.sort(key=lambda row: (order.get(row.method, len(order)), row.label, row.variant, row.size))
    return [*_untrained(kept, keys), *rows], notes + _remarks(rows, keys, names, common)


def _untrained(runs: Sequence[Record], keys: Sequence[str]) -> list[TableRow]:
    """The rows of the encoder before the first step, which all runs of a seed share, whatever their method."""
    keys = [key for key in keys if key.startswith(("backbone.", "data.", "precision")) or is_protocol(key)]
    prefix = f"{UNTRAINED}/"
    seeds: dict[str, dict[str, Record]] = defaultdict(dict)
    for run in runs:
        metrics = {key.removeprefix(prefix): run.metrics[key] for key in run.metrics if key.startswith(prefix)}
        if metrics:  # runs that start from other weights, and old runs, have none
            seeds[variant_of(run, keys)][run.params["seed"]] = replace(run, metrics=metrics)
    rows = []
    for variant, by_seed in sorted(seeds.items()):
        label = f"{UNTRAINED}, {variant}" if variant else UNTRAINED
        rows.append(TableRow(UNTRAINED, UNTRAINED, COLOURS[UNTRAINED], 0, 0, variant, label, tuple(by_seed.values())))
    return rows


def _remarks(
    rows: Sequence[TableRow], keys: Sequence[str], names: Sequence[str], common: Mapping[str, Mapping[str, str]]
) -> list[str]:
    """Note what the labels leave out, and what makes rows less comparable than they look."""
    runs = [run for row in rows for run in row.runs]
    notes = [*_unsaid(rows, keys, names, common), *_unlike_tags(rows, runs), *_unlike_evaluations(rows, runs)]
    seeds = sorted({len(row.runs) for row in rows})
    if len(seeds) > 1:
        notes.append(f"the rows differ in their number of seeds: {seeds[0]} to {seeds[-1]}")
    elif len({frozenset(run.params["seed"] for run in row.runs) for row in rows}) > 1:
        notes.append("the rows differ in their seeds")
    storing = [row for row in rows if row.size]
    if storing and not any(control_of(row, rows) for row in storing):
        notes.append(NO_CONTROL)
    young = [row for row in rows if row.values(RIGHT_POSITIVES) and int(row.runs[0].params["epochs"]) % cycle_of(row)]
    if young:
        titles = some_of([row.title for row in young])
        notes.append(f"{RIGHT_POSITIVES_TITLE} are counted soon after a reset of the prototypes: {titles}")
    nowhere, lacking = list[str](), defaultdict[str, list[str]](list)
    for metric, title in metrics_of(rows).items():
        having = [
            (row, len(row.values(metric))) for row in rows if row.method != UNTRAINED or metric != RIGHT_POSITIVES
        ]
        if not any(n for _, n in having):
            nowhere.append(title)
            continue
        where = [f"{row.title} ({len(row.runs) - n} of {len(row.runs)} runs)" for row, n in having if n < len(row.runs)]
        if where:
            lacking[some_of(where)].append(title)
    notes += [f"no {', '.join(titles)}: {where}" for where, titles in lacking.items()]
    if rows and nowhere:
        notes.append(f"no run has {', '.join(nowhere)}")
    return notes


def _unsaid(
    rows: Sequence[TableRow], keys: Sequence[str], names: Sequence[str], common: Mapping[str, Mapping[str, str]]
) -> Iterator[str]:
    """Note the settings in which the rows differ and which their labels leave out."""
    if names:
        yield f"the runs also differ in {', '.join(_typed(names))}: each combination has its own row"
    labels = {row.method: label_of(row.runs[0].params) for row in rows}
    unsaid = dict.fromkeys(
        f"{labels[method]}'s {_as_typed(key, value)}" if key.startswith(METHOD_PREFIXES) else f"{key}={value}"
        for method, values in common.items()
        for key, value in values.items()
        if key in names
    )
    if unsaid:
        yield f"where a row does not say otherwise: {', '.join(unsaid)}"
    if implied := sorted(set(keys) - set(names)):
        yield f"with {', '.join(_typed(names))} go {', '.join(_typed(implied))}"


def _as_typed(key: str, value: str) -> str:
    """``objective=published`` for the name of an objective, else the `setting_text`."""
    return f"{key.removesuffix('.name')}={value}" if key.endswith(".name") else setting_text(key, value)


def _typed(keys: Sequence[str]) -> list[str]:
    """The keys that a user types: ``init`` for the digest of its weights."""
    return ["init" if key == ORIGIN else key for key in keys]


def _unlike_tags(rows: Sequence[TableRow], runs: Sequence[Record]) -> Iterator[str]:
    """Note where runs differ in code, device or conditions, and which have collapsed."""
    code = sorted({tag for run in runs for tag in run.tags if tag.startswith(TAG_CODE)})
    for tag in (*COMPARED_TAGS, *code):
        found = [{run.tags[tag] for run in row.runs if tag in run.tags} for row in rows]
        mixed = [row.title for row, values in zip(rows, found, strict=True) if len(values) > 1]
        if mixed:
            yield f"the runs of a row differ in {tag}: {some_of(mixed)}"
        elif len(set().union(*found)) > 1:
            yield f"rows differ in {tag}"
    for tag, what in (
        (TAG_CONDITIONS_CHANGED, "continued under other conditions"),
        (TAG_EVALUATION_CHANGED, "with the figures of the last evaluation"),
    ):
        changed: dict[str, list[str]] = defaultdict(list)
        for run in runs:
            if tag in run.tags:
                changed[run.tags[tag]].append(run.name)
        yield from (f"{what} ({text}): {some_of(names)}" for text, names in changed.items())
    if collapsed := [run.name for run in runs if TAG_COLLAPSED in run.tags]:
        yield f"features or embeddings of different images became alike in training: {some_of(collapsed)}"


def _unlike_evaluations(rows: Sequence[TableRow], runs: Sequence[Record]) -> Iterator[str]:
    """Note the metrics that were measured by other settings than those of their runs, or by settings that differ."""
    if len({run.params.get("evaluation.bank") for run in runs} - {None}) > 1:
        yield "the runs differ in evaluation.bank: their val kNN cannot be compared"
    families: dict[str, set[str | None]] = defaultdict(set)
    for metric in metrics_of(rows):
        family = metric.rpartition("/")[0]
        keys = f"{TAG_EVALUATED}/{metric}", f"{TAG_EVALUATED}/{family}"
        families[family] |= {run.tags.get(keys[0], run.tags.get(keys[1])) for run in runs if metric in run.metrics}
    for family, by in families.items():
        if len(by) > 1:
            settings = sorted(each or "settings that no tag names" for each in by)
            yield f"the figures of {family} differ in how they were evaluated: {'; '.join(settings)}"
        elif by - {None}:
            yield f"{family} was evaluated with {by.pop()}"


def _changing(runs: Sequence[Record]) -> list[str]:
    """Notes on support sets whose number of vectors changes."""
    own: dict[str, list[Record]] = defaultdict(list)
    for run in runs:
        if PEAK in run.metrics:
            own[label_of(run.params)].append(run)
    return [
        f"the vectors of {label} are those in use at the end, the mean over a row's runs; in no run were there ever "
        f"more than {max(run.metrics[PEAK] for run in group):,.0f}, and bytes are of all that there is room for"
        for label, group in own.items()
    ]
