"""Where a run's numbers go: into its files first, and from there to MLflow.

MLflow's SQL store drops an exact repeat of (key, time, step, value), so delivering a row twice changes nothing, and
whatever a kill or an outage cut off is simply delivered again: at the next flush, on resume, or by hand with
``python -m src.tracking``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from src import store
from src.config import Tracking
from src.errors import UsageError, one_line
from src.record import METRICS, RECORD, Record, cut_and_read, encode, now

logger = logging.getLogger(__name__)


class Tracker:
    """The log of one run. A run whose output directory holds one already is continued.

    Training is deterministic, so a resumed run computes again what it had logged after its last checkpoint. Those rows
    are kept as they are, and `log` skips a metric at or before the last step it has: no gaps, no duplicates. A finished
    run that is opened again, to be evaluated, may log anything.

    A store that fails does not stop training: one line is logged, the rows stay in the file, and the next flush tries
    again. What could not be delivered by the end is named by `close`, with the command that delivers it.

    Args:
        directory: the run's output directory.
        tracking: the config group.
        run_name: what MLflow shows; a continued run keeps its own, and its experiment.
        params: the flattened config. A continued run keeps the values that it has.
        tags: replaced where they exist.

    Raises:
        UsageError: MLflow is not installed, or its local store does not open.
    """

    def __init__(
        self,
        directory: Path,
        tracking: Tracking,
        run_name: str,
        params: Mapping[str, object],
        tags: Mapping[str, str],
    ) -> None:
        self._client = store.prepare(tracking.experiment) if tracking.name == "mlflow" else None
        self._connected = self._warned = False
        self._retry_at = 0.0

        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        continued = (directory / RECORD).exists()
        self.record = record = Record.load(directory) if continued else Record.new(run_name, tracking.experiment)
        rows, end = cut_and_read(directory / METRICS)
        for row in rows:  # a kill may have come between a row and the record
            record.metrics |= {key: float(value) for key, value in row["metrics"].items()}
        self._opened = time.monotonic() - record.seconds
        finished = record.status == "FINISHED"
        self._last_step = {} if finished else {key: row["step"] for row in rows for key in row["metrics"]}
        record.delivered_bytes = min(record.delivered_bytes, end)

        record.status, record.end_time = "RUNNING", None
        record.params = {key: str(value) for key, value in params.items()} | record.params
        record.tags |= dict(tags) | {"output_dir": str(directory.resolve())}
        record.save(directory)
        self._rows = (directory / METRICS).open("a", buffering=1)
        self.flush()

    @property
    def run_id(self) -> str:
        """MLflow's id of the run; a generated one where there is no MLflow, or none so far."""
        return self.record.run_id

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Appends a row to ``metrics.jsonl``; `flush` delivers it."""
        new = {key: float(value) for key, value in metrics.items() if step > self._last_step.get(key, -1)}
        if not new:
            return
        row = {"step": step, "time": now(), "metrics": encode(new)}
        self._rows.write(json.dumps(row, allow_nan=False) + "\n")
        self.record.metrics |= new

    def flush(self) -> None:
        """Delivers what has not been. Costs a failing store at most a tenth of the training time."""
        if time.monotonic() >= self._retry_at:
            self._deliver()

    def artifact(self, path: Path) -> None:
        """Uploads a file of the output directory."""
        self.record.artifacts.append(os.path.relpath(path, self.directory))
        self.flush()

    def close(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """Ends the run, here and in MLflow."""
        self.record.status, self.record.end_time = status, now()
        self.record.save(self.directory)
        if not self._deliver():
            logger.warning(
                "MLflow lacks a part of this run; deliver it with: python -m src.tracking %s", self.directory
            )
        self._rows.close()

    def _deliver(self) -> bool:
        os.fsync(self._rows.fileno())  # the store is never told of a row which the file could still lose
        started = time.monotonic()
        try:
            if self._client and not self._connected:
                store.connect(self._client, self.directory, self.record)
                self._connected = True
            if self._client:
                store.push(self._client, self.directory, self.record)
        except Exception as error:  # whatever it is, training matters more
            self._retry_at = time.monotonic() + 10 * (time.monotonic() - started)
            if not self._warned:
                logger.warning("MLflow does not take rows, they are kept in %s: %s", METRICS, one_line(error))
            self._warned = True
            return False
        finally:
            self.record.seconds = time.monotonic() - self._opened
            self.record.save(self.directory)
        return True


def deliver(directory: Path) -> str:
    """Delivers the whole of a run that is not being trained, from its files, and returns its MLflow run id.

    Raises:
        UsageError: the folder holds no run, or the store does not take it.
    """
    record = Record.load(directory)
    client = store.prepare(record.experiment)
    record.delivered_bytes = record.delivered_artifacts = 0
    try:
        store.connect(client, directory, record)
        store.push(client, directory, record)
    except Exception as error:
        raise UsageError(f"MLflow does not take {directory} ({one_line(error)}): try again later") from None
    record.save(directory)
    return record.run_id


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

    A run of several sweeps is shown under the last of them; its tags ``sweep.ID`` name all.
    """
    for directory in children:
        record = Record.load(directory)
        record.tags |= parent_tags(str(parent.directory))
        record.save(directory)
    if not parent._client:
        return
    try:
        for directory in children:
            record = Record.load(directory)
            found = parent._client.search_runs(
                [store.experiment_id(parent._client, record.experiment)], f"tags.uuid = '{record.uuid}'", max_results=1
            )
            if not found or found[0].info.status != record.status:
                deliver(directory)
                continue
            for key, value in record.tags.items():
                if found[0].data.tags.get(key) != value:
                    parent._client.set_tag(found[0].info.run_id, key, value)
    except Exception as error:
        logger.warning("MLflow could not be told which runs belong to %s: %s", parent.directory, one_line(error))


def share(parent: Tracker, view: Callable[[str, str, str, int], tuple[str, str, str]]) -> str:
    """Tags the experiment with a view of a sweep's jobs; returns where MLflow shows it, empty where there is no MLflow.

    Args:
        view: `src.charts.sweep_view`.
    """
    if not parent._client:
        return ""
    record = parent.record
    try:
        experiment_id = store.experiment_id(parent._client, record.experiment)
        key, value, path = view(experiment_id, record.run_id, parent.directory.name, record.start_time)
        parent._client.set_experiment_tag(experiment_id, key, value)
    except Exception as error:
        logger.warning("MLflow does not take the view of %s: %s", parent.directory, one_line(error))
        return ""
    return path


def abandon(directory: Path, reason: str) -> None:
    """Closes a run, as failed, whose process ended without doing so."""
    record = Record.load(directory)
    record.status, record.end_time = "FAILED", now()
    record.tags["error"] = reason
    record.save(directory)


def main(arguments: Iterable[str] | None = None) -> None:
    """Delivers the runs in the folders that are named."""
    parser = argparse.ArgumentParser(prog="python -m src.tracking", description="Deliver finished runs to MLflow.")
    parser.add_argument("output_dir", type=Path, nargs="+", help="a run's output directory")
    for directory in parser.parse_args(arguments).output_dir:
        print(f"{directory}: delivered as run {deliver(directory)}")


if __name__ == "__main__":
    try:
        main()
    except UsageError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
