"""Sweeps in MLflow's own pages: charts that one link opens, and descriptions that lead to them.

MLflow keeps a view of an experiment's runs (filter, order, charts) as a tag of the experiment, lists it by name under
"Saved views", and opens it by a key in the address. The tag's content is not documented. It is written here as the
pages of MLflow 3.16 and 3.17 write and read it: what is left out has their own default, and what they cannot read they
report and ignore. ``tests/test_browser.py`` looks at the result with a real browser; run it before moving MLflow's pin.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from src.config.identity import LOG_SIZE
from src.reporting.comparison import select
from src.reporting.plots import caption
from src.reporting.rows import ACCURACY, GAIN, RANKING, RIGHT_POSITIVES, TABLE_METRICS, TableRow
from src.reporting.table import GAIN_NOTE, markdown, table
from src.runs.delivery import DELIVERY_TIMEOUT_S, deliver
from src.runs.directory import exclusive
from src.runs.mlflow_store import STORE_TIMEOUT_S, call_for_run
from src.runs.query import record_of
from src.runs.record import TAG_CHARTS, TAG_NOTE, TAG_SWEEP_ID, Record, now_ms
from src.runs.tracker import Tracker
from src.system.deadline import within
from src.system.redact import one_line

OTHER_SECTIONS = ("test", "val", "support", "train", "time", "memory", "untrained", "teacher")
CHARTED = (ACCURACY, RIGHT_POSITIVES)  # the metrics that are drawn against the support-set size
COURSE = "val/knn_top1"  # the metric that is drawn over the steps of training
LOSS = "train/loss"  # is drawn instead where there are no validation images
OPENING = "Support-set size against accuracy"  # the first words of every description, by which ours are recognised
MAX_NOTE_CHARS = 7500  # of a description: MLflow cuts a run's after 8,000
MIN_LINE_CHARS = 20  # in a line of a table
MAX_LEFT_OUT = 100  # jobs that a view names, because MLflow refuses an experiment's tag above 20,000 characters
MAX_LINKED_SWEEPS = 20  # older sweeps that an experiment's description links to

logger = logging.getLogger(__name__)


class SavedView(NamedTuple):
    """A view of an experiment's runs: the tag of the experiment that holds it, and where MLflow shows it."""

    key: str
    value: str
    path: str  # after the address of the server, a slash between them


class SweepCharts(NamedTuple):
    """A sweep that the description of its experiment mentions."""

    name: str
    path: str  # of the sweep's charts, after the address of the server
    note: str  # the sweep's own description; empty if it has no result


def sweep_view(
    experiment_id: str,
    sweep_run_id: str,
    name: str,
    created: int,
    measured: Collection[str] = (),
    left_out: Sequence[str] = (),
) -> SavedView:
    """The jobs of a sweep, best first, beside charts of support-set size against accuracy.

    The best are so by validation images, or by test images where no job has validation images.

    The list is flat, because MLflow draws the runs that its list shows, and opens a list with every parent collapsed.
    Sorted by the time of creation, the same page nests the jobs under their sweep.

    Args:
        sweep_run_id: the run that the jobs name in their tag ``mlflow.parentRunId``.
        name: what "Saved views" lists.
        created: the time that it shows there, in milliseconds since the epoch.
        measured: the metrics that finished jobs have, since a chart of any other would be empty; none: no job is known
            to have finished, so all are drawn.
        left_out: the ids of finished jobs that the sweep's table leaves out, of which `MAX_LEFT_OUT` have room.
    """
    measured = measured or (*CHARTED, RANKING, COURSE)
    # Charts would have points of jobs that were stopped, pruned or diverged, beside those of whole runs.
    drawn = f"tags.`mlflow.parentRunId` = '{sweep_run_id}' and attributes.status != 'KILLED' "
    drawn += "and attributes.status != 'FAILED'"
    if left_out:
        drawn += f" and attributes.run_id NOT IN ({', '.join(map(repr, left_out[:MAX_LEFT_OUT]))})"
    state = {
        "searchFilter": drawn,
        "orderByKey": f"metrics.`{RANKING if RANKING in measured else ACCURACY}`",
        "orderByAsc": False,
        "runsHiddenMode": "SHOW_ALL",  # the default draws ten runs
        "compareRunCharts": _charts(measured),
        "compareRunSections": _sections(),
        "isAccordionReordered": True,  # else the sections are sorted by name
    }
    value = json.dumps({"name": name, "createdAt": created, "updatedAt": created, "state": json.dumps(state)})
    return SavedView(_view_key(sweep_run_id), value, _view_path(experiment_id, sweep_run_id))


def _view_key(sweep_run_id: str) -> str:
    return f"mlflow.sharedViewState.{sweep_run_id}"


def _view_path(experiment_id: str, sweep_run_id: str) -> str:
    query = f"viewStateShareKey={sweep_run_id}&compareRunsMode=CHART&workflowType=machine_learning"
    return f"#/experiments/{experiment_id}/runs?{query}"


def _charts(measured: Collection[str]) -> list[dict[str, Any]]:
    """Charts by log10 of the size, which is a param of its own: MLflow has logarithmic axes for steps only."""
    size = {"type": "PARAM", "key": LOG_SIZE}
    charted = [metric for metric in CHARTED if metric in measured]
    joined = [metric for metric in (COURSE, RANKING, ACCURACY) if metric in measured]  # the last one gives the colour
    course = COURSE if COURSE in measured else LOSS
    charts: list[dict[str, Any]] = [
        *({"type": "SCATTER", "xaxis": size, "yaxis": {"type": "METRIC", "key": metric}} for metric in charted),
        {"type": "PARALLEL", "selectedParams": [LOG_SIZE], "selectedMetrics": joined},
        {"type": "LINE", "metricKey": course, "selectedMetricKeys": [course], "lineSmoothness": 0},
    ]
    return [chart | {"uuid": f"chart-{place}", "metricSectionId": "sweep"} for place, chart in enumerate(charts)]


def _sections() -> list[dict[str, Any]]:
    """Our section and, collapsed below it, those in which MLflow puts a chart of every metric, by prefix."""
    ours = {"uuid": "sweep", "name": "Support-set size and accuracy", "display": True, "columns": 2, "cardHeight": 280}
    others = [{"uuid": name, "name": name, "display": False} for name in OTHER_SECTIONS]
    return [ours, *others]


def describe_sweep(name: str, rows: Sequence[TableRow], best: str = "") -> str:
    """The description of a sweep's run, in Markdown: its table, without columns for which the page is too narrow.

    Args:
        name: the sweep's.
        rows: of the table.
        best: what a search has found, in words; empty: this is no search.
    """
    header, *body = table(rows)
    kept = [place for place, title in enumerate(header) if title in ("method", "vectors", "seeds", GAIN)]
    kept += [place for place, title in enumerate(header) if title in TABLE_METRICS.values()]
    head, *lines = ([line[place] for place in sorted(kept)] for line in (header, *body))
    above = f"{OPENING} in the sweep {name}: {caption(rows)}.\n"
    above += f"\nBest: {best}.\n" if best else ""
    below = f"\n{GAIN_NOTE[0].upper()}{GAIN_NOTE[1:]}." if GAIN in header else ""
    for fit in range(min(len(lines), MAX_NOTE_CHARS // MIN_LINE_CHARS), -1, -1):
        more = f"\n{len(lines) - fit} more rows are in the artifact table.md." if fit < len(lines) else ""
        text = "\n".join([above, *markdown(head, lines[:fit])]) + f"\n{more}{below}"
        if len(text) <= MAX_NOTE_CHARS:
            break
    return text


def describe_experiment(sweeps: Sequence[SweepCharts]) -> str:
    """The description of an experiment, in Markdown; its page shows the first paragraph, and the rest on demand.

    Args:
        sweeps: those that have a result, the newest first.
    """
    newest, *older = sweeps
    first = f"{OPENING}: how many vectors must a contrastive learner store to find good positives?"
    parts = [f"{first} [Charts of the newest sweep, {newest.name}]({newest.path})", newest.note]
    if older := older[:MAX_LINKED_SWEEPS]:
        parts.append("Charts of older sweeps: " + ", ".join(f"[{each.name}]({each.path})" for each in older))
    parts.append("`python -m src.report experiment=NAME` makes a table and a plot of all runs of an experiment.")
    return "\n\n".join(part.strip() for part in parts)


def show_sweep(client: Any, record: Record) -> str:
    """Give a sweep's experiment a view of the sweep's jobs, and a description of its newest sweeps.

    A description that a user has written stays.

    Returns:
        The path of the view, after the address of the server.
    """
    home = client.get_experiment(client.get_run(record.run_id).info.experiment_id)
    # A job that has not finished, there, lacks metrics that are still to be delivered.
    jobs = f"tags.`mlflow.parentRunId` = '{record.run_id}' and attributes.status = 'FINISHED'"
    finished = client.search_runs([home.experiment_id], jobs)
    measured = {metric for job in finished for metric in job.data.metrics}
    in_table = {each.run_id for each in select([record_of(job, home.name) for job in finished])[0]}
    left_out = [job.info.run_id for job in finished if job.info.run_id not in in_table]
    key, value, path = sweep_view(home.experiment_id, record.run_id, record.name, record.start_time, measured, left_out)
    client.set_experiment_tag(home.experiment_id, key, value)

    found = [(record.end_time or now_ms(), SweepCharts(record.name, path, record.tags.get(TAG_NOTE, "")))]
    for run in client.search_runs([home.experiment_id], "tags.sweep_id != ''"):  # the newest 1,000, which is plenty
        info = run.info
        if _view_key(info.run_id) in home.tags and info.run_id != record.run_id:
            path_of_other = _view_path(home.experiment_id, info.run_id)
            charts = SweepCharts(info.run_name, path_of_other, run.data.tags.get(TAG_NOTE, ""))
            found.append((info.end_time or info.start_time, charts))
    sweeps = [sweep for _, sweep in sorted(found, reverse=True) if sweep.note]
    before = home.tags.get(TAG_NOTE, "")
    if sweeps and (not before or before.startswith(OPENING)):
        client.set_experiment_tag(home.experiment_id, TAG_NOTE, describe_experiment(sweeps))
    return path


def publish(sweep: Tracker) -> None:
    """Show a sweep in MLflow's pages, and tag its run with the path of the view; if the store fails, only warn."""
    sweep.record.tags.pop(TAG_CHARTS, None)  # a delivery calls `publish_again` if it is missing

    def published() -> str:
        client = sweep.client()
        return show_sweep(client, sweep.record) if client else ""

    try:
        if path := within(STORE_TIMEOUT_S, published):
            sweep.record.tags[TAG_CHARTS] = path
    except Exception as error:
        logger.warning("MLflow does not take the view of %s: %s", sweep.directory, one_line(error))


def publish_again(directory: Path) -> None:
    """`publish` a sweep that has ended, once MLflow has its run; do nothing for a run that is no sweep."""
    with exclusive(directory):
        record = Record.load(directory)
        if TAG_SWEEP_ID not in record.tags or not record.entry.run_id:
            return
        record.tags[TAG_CHARTS] = call_for_run(directory, DELIVERY_TIMEOUT_S, lambda client: show_sweep(client, record))
        record.save(directory)
    deliver(directory)  # the tag
