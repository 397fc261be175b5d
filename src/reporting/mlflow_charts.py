"""A sweep's charts in MLflow's own interface: one link opens them.

MLflow keeps a view of an experiment's runs (filter, order, charts) as a tag of the experiment, lists it by name under
"Saved views", and opens it by a key in the address. The tag's content is not documented. It is written here as the
pages of MLflow 3.16 and 3.17 write and read it: what is left out has their own default, and what they cannot read they
report and ignore. ``tests/test_browser.py`` looks at the result with a real browser; run it before moving MLflow's pin.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from src.reporting.plots import PLOTTED

SIZE = "support_set_size"
COURSE = "val/knn_top1"  # what is drawn over the steps of training


class View(NamedTuple):
    """A tag for the experiment, and where MLflow then shows what it describes."""

    key: str
    value: str
    path: str  # after the address of the server, a slash between them


def sweep_view(experiment_id: str, sweep_run_id: str, name: str, created: int) -> View:
    """The jobs of a sweep, best first, beside charts of support-set size against accuracy.

    The list is flat, because MLflow draws the runs that its list shows, and opens a list with every parent collapsed.
    Sorted by the time of creation, the same page nests the jobs under their sweep.

    Args:
        sweep_run_id: the run that the jobs name in their tag ``mlflow.parentRunId``.
        name: what "Saved views" lists.
        created: the time that it shows there, in milliseconds since the epoch.
    """
    accuracy = next(iter(PLOTTED))
    state = {
        "searchFilter": f"tags.`mlflow.parentRunId` = '{sweep_run_id}'",
        "orderByKey": f"metrics.`{accuracy}`",
        "orderByAsc": False,
        "runsHiddenMode": "SHOW_ALL",  # the default draws ten runs
        "compareRunCharts": _charts(),
        "compareRunSections": _sections(),
        "isAccordionReordered": True,  # or the sections are sorted by name
    }
    value = json.dumps({"name": name, "createdAt": created, "updatedAt": created, "state": json.dumps(state)})
    query = f"viewStateShareKey={sweep_run_id}&compareRunsMode=CHART&workflowType=machine_learning"
    return View(f"mlflow.sharedViewState.{sweep_run_id}", value, f"#/experiments/{experiment_id}/runs?{query}")


def _charts() -> list[dict[str, Any]]:
    """The scatter plots' size axis is linear: MLflow offers a logarithm for training steps only."""
    size = {"type": "PARAM", "key": SIZE}
    charts: list[dict[str, Any]] = [
        *({"type": "SCATTER", "xaxis": size, "yaxis": {"type": "METRIC", "key": figure}} for figure in PLOTTED),
        # The last metric gives the lines their colour.
        {"type": "PARALLEL", "selectedParams": [SIZE], "selectedMetrics": [COURSE, *reversed(PLOTTED)]},
        {"type": "LINE", "metricKey": COURSE, "selectedMetricKeys": [COURSE], "lineSmoothness": 0},
    ]
    return [chart | {"uuid": f"chart-{place}", "metricSectionId": "sweep"} for place, chart in enumerate(charts)]


def _sections() -> list[dict[str, Any]]:
    """Ours, and below it, collapsed, those in which MLflow puts a chart of every metric by the metric's prefix."""
    ours = {"uuid": "sweep", "name": "Support-set size and accuracy", "display": True, "columns": 2, "cardHeight": 280}
    others = [{"uuid": name, "name": name, "display": False} for name in ("test", "val", "support", "train", "time")]
    return [ours, *others]
