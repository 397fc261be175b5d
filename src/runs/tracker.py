"""Where a run's numbers go: into its files first, and from there to MLflow.

MLflow's SQL store drops an exact repeat of (key, time, step, value), so delivering a row twice changes nothing, and
whatever a kill or an outage cut off is simply delivered again: at the next flush, on resume, or by hand with
``python -m src.tracking``.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from src.config.schema import Tracking
from src.errors import UsageError
from src.runs import directory as run_directory
from src.runs import mlflow_store
from src.runs.record import METRICS, Record, cut_and_read, encode, now, records_below
from src.system.redact import one_line

COLOUR_TAG = "mlflow.runColor"  # of a run: its colour in every chart of MLflow's pages, such as "#0072b2"

logger = logging.getLogger(__name__)


class Tracker:
    """The log of one run. A run whose output directory holds one already is continued.

    Training is deterministic, so a resumed run computes again what it had logged after its last checkpoint. Those rows
    are kept as they are, and `log` skips a metric at or before the last step it has: no gaps, no duplicates. A finished
    run that is opened again, to be evaluated, may log anything.

    A store that fails does not stop training: one line is logged, the rows stay in the file, and the next flush tries
    again. What could not be delivered by the end is named by `close`, with the command that delivers it.

    Args:
        directory: the run's output directory, whose name MLflow shows. A continued run keeps its name and experiment.
        tracking: the config group.
        params: the flattened config. A continued run keeps the values that it has.
        tags: replaced where they exist.

    Raises:
        UsageError: MLflow is not installed, or its local store does not open.
    """

    def __init__(
        self,
        directory: Path,
        tracking: Tracking,
        params: Mapping[str, object],
        tags: Mapping[str, str],
    ) -> None:
        self._client: Any = None
        if tracking.name == "mlflow":
            with suppress(mlflow_store.Busy):
                self._client = mlflow_store.prepare(tracking.experiment)
        self._connected = self._warned = False
        self._retry_at = 0.0

        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.record = record = Record.find(directory) or Record.new(directory.resolve().name, tracking.experiment)
        rows, end = cut_and_read(directory / METRICS)
        for row in rows:  # a kill may have come between a row and the record
            record.metrics |= {key: float(value) for key, value in row["metrics"].items()}
        self._opened = time.monotonic() - record.seconds
        finished = record.status == "FINISHED"
        self._last_step = {} if finished else {key: row["step"] for row in rows for key in row["metrics"]}
        record.delivered_bytes = min(record.delivered_bytes, end)

        record.status, record.end_time = "RUNNING", None
        record.for_mlflow = tracking.name == "mlflow"
        record.params = {key: str(value) for key, value in params.items()} | record.params
        record.tags |= dict(tags) | {"output_dir": str(directory.resolve())}
        record.tags.pop("error", None)  # of the session before
        record.save(directory)
        self._rows = (directory / METRICS).open("ab", buffering=0)
        self.flush()

    @property
    def run_id(self) -> str:
        """MLflow's id of the run; a generated one where there is no MLflow, or none so far."""
        return self.record.run_id

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Appends a row to ``metrics.jsonl``; `flush` delivers it.

        Raises:
            OSError: there is no room for it.
        """
        new = {key: float(value) for key, value in metrics.items() if step > self._last_step.get(key, -1)}
        if not new:
            return
        row = json.dumps({"step": step, "time": now(), "metrics": encode(new)}, allow_nan=False).encode() + b"\n"
        if self._rows.write(row) < len(row):  # a disk that is full takes a part, and refuses the next
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.directory / METRICS))
        self.record.metrics |= new

    def sync(self) -> None:
        """Puts all rows on the disk, so that not even a power cut loses one."""
        os.fsync(self._rows.fileno())

    def flush(self) -> None:
        """Delivers what has not been. Costs a failing store at most a tenth of the training time."""
        self.sync()  # the store is never told of a row which the file could still lose
        if time.monotonic() >= self._retry_at:
            self._deliver()
        self._save()

    def artifact(self, path: Path) -> None:
        """Uploads a file of the output directory."""
        self.record.artifacts.append(os.path.relpath(path, self.directory))
        self.flush()

    def close(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """Ends the run, here and in MLflow; a run that was told to stop does not wait for a store that fails.

        Raises:
            OSError: there is no room to write that the run is finished. Another status is then told to MLflow only.
        """
        self.record.close(status)
        try:
            self._save()
        except OSError:
            if status == "FINISHED":
                raise
        waits = status == "KILLED" and time.monotonic() < self._retry_at
        if self.record.for_mlflow and (waits or not self._deliver()):
            logger.warning(
                "MLflow lacks a part of this run; deliver it with: python -m src.tracking %s", self.directory
            )
        with suppress(OSError):
            self._save()
        self._rows.close()

    def _save(self) -> None:
        self.record.seconds = time.monotonic() - self._opened
        self.record.save(self.directory)

    def _deliver(self) -> bool:
        if not self.record.for_mlflow:
            return True
        started = time.monotonic()
        try:
            client = self.client()
            if not self._connected:
                mlflow_store.connect(client, self.record)
                self._connected = True
            mlflow_store.push(client, self.directory, self.record)
        except Exception as error:  # whatever it is, training matters more
            self._retry_at = time.monotonic() + 10 * (time.monotonic() - started)
            if not self._warned:
                logger.warning("MLflow does not take rows, they are kept in %s: %s", METRICS, one_line(error))
            self._warned = True
            return False
        return True

    def client(self) -> Any:
        """MLflow's client. None with ``tracking=jsonl``.

        Raises:
            UsageError: the store does not open, or not now.
        """
        if self._client is None and self.record.for_mlflow:
            self._client = mlflow_store.prepare(self.record.experiment)
        return self._client


def deliver(directory: Path) -> str:
    """Delivers the whole of a run that is not being trained, from its files, and returns its MLflow run id.

    A run whose process ended without closing it, by a SIGKILL say, is closed as killed.

    Raises:
        UsageError: the folder holds no run, a process works on it, or the store does not take it.
    """
    Record.load(directory)
    with run_directory.exclusive(directory):
        record = Record.load(directory)
        if record.status == "RUNNING":
            record.close("KILLED", "its process is gone; the same command continues")
        _deliver_whole(directory, record)
    return record.run_id


def catch_up(directory: Path) -> None:
    """Delivers what MLflow lacks of a run that has ended, if a kill came in between; a failing store is only noted.

    For the process that holds the directory.
    """
    record = Record.load(directory)
    if record.is_delivered(directory):
        return
    try:
        _deliver_whole(directory, record)
    except UsageError as error:
        logger.warning("%s", error)


def _deliver_whole(directory: Path, record: Record) -> None:
    client = mlflow_store.prepare(record.experiment)
    record.delivered_bytes = record.delivered_artifacts = 0
    try:
        mlflow_store.connect(client, record)
        mlflow_store.push(client, directory, record)
    except Exception as error:
        raise UsageError(f"MLflow does not take {directory} ({one_line(error)}): try again later") from None
    finally:
        record.save(directory)


def waiting(root: Path) -> list[Path]:
    """The folders below ``root`` of runs that MLflow lacks a part of, or believes to be running, oldest first.

    A run that a process works on is not waiting.
    """
    folders = []
    for directory, record in records_below(root):
        if record.status == "RUNNING" or not record.is_delivered(directory):
            folders.append((record.start_time, directory))
    return [folder for _, folder in sorted(folders) if not run_directory.is_held(folder)]


def parent_tags(parent: str | None) -> dict[str, str]:
    """The tags that nest a run under a sweep's, whose folder is given; none without one."""
    if parent is None:
        return {}
    record = Record.load(Path(parent))
    tags = {f"sweep.{record.tags['sweep_id']}": "true"}
    if record.run_id != record.uuid:  # else MLflow does not have the sweep so far, and `nest` does it in the end
        tags["mlflow.parentRunId"] = record.run_id
    return tags


def nest(parent: Tracker, children: Sequence[Path]) -> None:
    """Puts runs that have ended under a sweep's, and delivers what MLflow lacks of them; a failing store is only noted.

    A run of several sweeps is shown under the last of them; its tags ``sweep.ID`` name all. One that another process
    works on is left to that process.
    """
    tags = parent_tags(str(parent.directory))
    for directory in children:
        with suppress(UsageError), run_directory.exclusive(directory):
            record = Record.load(directory)
            if not tags.items() <= record.tags.items():
                record.tags |= tags
                record.delivered_status = ""
                record.save(directory)
    try:
        client = parent.client()
        for directory in children if client else []:
            if not run_directory.is_held(directory):
                _deliver_changes(client, directory)
    except Exception as error:
        logger.warning("MLflow could not be told which runs belong to %s: %s", parent.directory, one_line(error))


def _deliver_changes(client: Any, directory: Path) -> None:
    """Delivers a run that MLflow lacks, and otherwise only the tags that are new."""
    record = Record.load(directory)
    found = mlflow_store.find(client, record)
    if not found or found.info.status != record.status:
        deliver(directory)
        return
    for key, value in record.tags.items():
        if found.data.tags.get(key) != value:
            client.set_tag(found.info.run_id, key, value)
    with suppress(UsageError), run_directory.exclusive(directory):
        record = Record.load(directory)
        if record.status == found.info.status:
            record.delivered_status = record.status
            record.save(directory)


def share(parent: Tracker, view: Callable[[str, str, str, int], tuple[str, str, str]]) -> str:
    """Tags the experiment with a view of a sweep's jobs; returns where MLflow shows it, empty where there is no MLflow.

    Args:
        view: `src.reporting.mlflow_charts.sweep_view`.
    """
    record = parent.record
    try:
        client = parent.client()
        if client is None:
            return ""
        experiment_id = mlflow_store.experiment_id(client, record.experiment)
        key, value, path = view(experiment_id, record.run_id, parent.directory.name, record.start_time)
        client.set_experiment_tag(experiment_id, key, value)
    except Exception as error:
        logger.warning("MLflow does not take the view of %s: %s", parent.directory, one_line(error))
        return ""
    return path


def abandon(directory: Path, reason: str) -> None:
    """Closes a run, as failed, whose process ended without doing so."""
    record = Record.load(directory)
    record.close("FAILED", reason)
    record.save(directory)


def main(arguments: Iterable[str] | None = None) -> None:
    """Delivers the runs in the folders that are named, else all below ``multirun/`` that MLflow lacks a part of."""
    parser = argparse.ArgumentParser(prog="python -m src.tracking", description=main.__doc__)
    parser.add_argument("output_dir", type=Path, nargs="*", help="a run's output directory")
    named = parser.parse_args(arguments).output_dir
    for directory in named or waiting(run_directory.ROOT):
        print(f"{directory}: delivered as run {deliver(directory)}", flush=True)
