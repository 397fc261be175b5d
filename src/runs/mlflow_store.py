"""MLflow's store: opening it, bringing a run in it up to the run's files, listing what it holds.

This is the only file that imports mlflow, and it does so late: the import takes seconds, and a run with
``tracking=jsonl`` does not need the package.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from src.errors import UsageError
from src.runs.record import METRICS, Record, read_rows
from src.system.redact import one_line, redact

_AWAY = re.compile("database is locked|connection to server|could not connect|can't connect", re.IGNORECASE)


class Busy(UsageError):  # noqa: N818
    """The store is there, or may be, but does not answer now."""


def check(experiment: str) -> None:
    """Refuses what is no store, before a run writes anything; one that is only busy gets the run later.

    Raises:
        UsageError: as `prepare`.
    """
    with suppress(Busy):
        prepare(experiment)


def prepare(experiment: str = "Default") -> Any:
    """Opens the MLflow store, creates a local one that is not there yet, and returns the client.

    The store is what MLFLOW_TRACKING_URI names, or ``mlflow.db`` in the current folder, which is what ``mlflow ui``
    shows. MLflow creates a SQLite store in dozens of migrations, and two processes that do it at once, or one that is
    killed meanwhile, leave a file that never opens again. So it is created under a lock, aside, and renamed.

    Only a database is opened here, and must open. A server that does not answer yet may do so later in the run.

    Raises:
        Busy: the database is locked or away.
        UsageError: MLflow is not installed, the store does not open, or the experiment has been deleted in it.
    """
    mlflow = _import_mlflow()
    uri = mlflow.get_tracking_uri()
    path = _sqlite_path(uri)
    try:
        if path is None:
            return mlflow.MlflowClient(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                aside = path.with_name(f"{path.name}.new")
                aside.unlink(missing_ok=True)
                mlflow.MlflowClient(f"sqlite:///{aside}")
                os.replace(aside, path)
            client = mlflow.MlflowClient(uri)
            found = client.get_experiment_by_name(experiment)
    except Exception as error:
        if _AWAY.search(str(error)):
            raise Busy(f"the MLflow store {redact(uri)} does not open now ({one_line(error)}): try again") from None
        remedy = "move it away, set MLFLOW_TRACKING_URI, or use tracking=jsonl"
        raise UsageError(f"the MLflow store {redact(uri)} does not open ({one_line(error)}): {remedy}") from None
    if found and found.lifecycle_stage == "deleted":
        remedy = f"run `mlflow experiments restore -x {found.experiment_id}`, or choose another tracking.experiment"
        raise UsageError(f"the experiment {experiment!r} has been deleted in {redact(uri)}: {remedy}")
    return client


def _import_mlflow() -> Any:
    quiet = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # it logs a traceback of each failure that is handled here
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the next flush is the retry: do not stop training for minutes
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    try:
        import mlflow
    except ImportError as error:
        remedy = "run `make setup`, or use tracking=jsonl"
        raise UsageError(f"tracking=mlflow cannot import MLflow ({one_line(error)}): {remedy}") from None
    return mlflow


def _sqlite_path(uri: str) -> Path | None:
    if not uri.startswith("sqlite:///") or uri.endswith(":memory:"):
        return None
    return Path(uri.removeprefix("sqlite:///").partition("?")[0])


def existing() -> Any:
    """The client, unless that would create a store in a folder which has none."""
    uri = _import_mlflow().get_tracking_uri()
    path = _sqlite_path(uri)
    if path and not path.exists():
        raise UsageError(f"there is no MLflow store at {path}: change to the project root, or set MLFLOW_TRACKING_URI")
    return prepare()


def experiment_id(client: Any, name: str) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment:
        return experiment.experiment_id
    try:
        return client.create_experiment(name)
    except MlflowException:  # another process was faster, or the store is down
        experiment = client.get_experiment_by_name(name)
        if not experiment:
            raise
        return experiment.experiment_id


def find(client: Any, record: Record) -> Any:
    """The record's run in the store, or None.

    It is found by the uuid that it is tagged with, not by its id: a run whose creator was killed before it could write
    the id down is found too.
    """
    experiment = experiment_id(client, record.experiment)
    return next(iter(client.search_runs([experiment], f"tags.uuid = '{record.uuid}'", max_results=1)), None)


def connect(client: Any, record: Record) -> None:
    """Finds the run or creates it, also one that the store has lost, and hands over its params and tags."""
    from mlflow.entities import Param, RunTag

    run = find(client, record)
    if run is None:
        experiment, tags = experiment_id(client, record.experiment), {"uuid": record.uuid}
        run = client.create_run(experiment, start_time=record.start_time, tags=tags, run_name=record.name)
        record.delivered_bytes = record.delivered_artifacts = 0
    record.run_id, record.delivered_status = run.info.run_id, ""
    client.log_batch(
        record.run_id,
        params=[Param(key, value) for key, value in record.params.items()],
        tags=[RunTag(key, value) for key, value in record.tags.items()],
    )
    if record.status == "RUNNING":
        client.update_run(record.run_id, status="RUNNING")


def push(client: Any, directory: Path, record: Record) -> None:
    """Brings the store's run up to the files. Harmless when repeated."""
    from mlflow.entities import Metric

    rows, end = read_rows(directory / METRICS, record.delivered_bytes)
    metrics = [
        Metric(key, float(value), row["time"], row["step"]) for row in rows for key, value in row["metrics"].items()
    ]
    client.log_batch(record.run_id, metrics)  # which cuts it into requests of at most 1,000
    record.delivered_bytes = end
    for name in record.artifacts[record.delivered_artifacts :]:
        if (directory / name).exists():  # the folder may have been tidied before a late delivery
            client.log_artifact(record.run_id, str(directory / name))
        record.delivered_artifacts += 1
    if record.status != "RUNNING":
        client.set_terminated(record.run_id, record.status, record.end_time)
    record.delivered_status = record.status
