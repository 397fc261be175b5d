"""The log of a run's metrics, tags and artifacts: first to its files, and from there to MLflow.

MLflow's SQL store drops an exact repeat of (key, time, step, value), so delivering a row twice changes nothing. A
delivery that a kill or an outage cut off is simply repeated: at the next flush, on resume, or later
(`src.runs.delivery`).
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from src.config.schema import Tracking
from src.errors import CannotWrite, UsageError
from src.runs import mlflow_store
from src.runs.metrics_file import cut_and_read, digest_of, encode
from src.runs.record import METRICS, TAG_OUTPUT_DIR, TAG_PARENT, TAG_SWEEP_ID, TAGS_OF_SESSION_END, Record, now_ms
from src.system.deadline import Call, Overdue, within
from src.system.redact import one_line

Status = Literal["FINISHED", "FAILED", "KILLED"]  # how a run may end
STOPPING_TIMEOUT_S = 5.0  # for a delivery of a run that has been told to stop
SLOW_DELIVERY_S = 1.0  # after a longer delivery, the next one waits ten times as long as it took

logger = logging.getLogger(__name__)


class Tracker:
    """The log of one run. If the output directory already holds a run, that run is continued.

    Training is deterministic, so a resumed run computes again what it had logged after its last checkpoint. Those rows
    are kept as they are, and `log` skips a metric at a step that the file has: no gaps, no duplicates. A finished run
    that is opened again, to be evaluated, may log anything.

    A store that fails or hangs does not stop training: each delivery has a deadline, one line is logged, the rows stay
    in the file, and a later flush tries again. If something is still undelivered at the end, `close` logs the command
    that delivers it.

    Args:
        directory: the run's output directory. MLflow shows its name; a continued run keeps the name that it has.
        tracking: the config group. A run that was requested in other experiments before belongs to all of them.
        params: the flattened config. A continued run keeps the values that it has.
        tags: the run's tags, which replace those of the same name.
        is_stopping: returns whether the run has been told to stop; then a delivery takes at most `STOPPING_TIMEOUT_S`.
        reopens: whether a finished run is opened to get further metrics. However this process ends, such a run stays
            finished, and keeps its end time and its duration. If MLflow no longer has it, a line says so, and it is not
            delivered.

    Raises:
        UsageError: MLflow is not installed, the store does not open, the record or a row is damaged, or
            ``tracking.parent`` is not a sweep's folder.
    """

    def __init__(
        self,
        directory: Path,
        tracking: Tracking,
        params: Mapping[str, object],
        tags: Mapping[str, str],
        is_stopping: Callable[[], object] = lambda: False,
        *,
        reopens: bool = False,
    ) -> None:
        self.tracking, self.is_stopping = tracking, is_stopping
        self._client: Any = None
        self._call: Call[None] | None = None
        with suppress(mlflow_store.Busy, Overdue):
            within(mlflow_store.STORE_TIMEOUT_S, self.client)
        self._delivery: mlflow_store.Delivery | None = None
        self._warned = self._fails = self._gone = False
        self._reopens = reopens
        self._retry_at = 0.0
        self._end_watch: Callable[[], None] | None = None

        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.record = record = Record.find(directory) or Record.new(directory.resolve().name, tracking.experiment)
        record.request(tracking).tags |= parent_tags(tracking.parent, tracking.experiment)
        rows = cut_and_read(directory / METRICS)
        self._last_step: dict[str, int] = {}
        for row in rows:  # the record lacks the last rows if a kill came before it was saved
            self._remember(row["metrics"], row["step"])
        self._opened = time.monotonic() - record.seconds
        finished = record.status == "FINISHED"
        self._logged = set() if finished else {(key, row["step"]) for row in rows for key in row["metrics"]}

        self._ended = record.end_time if reopens else None
        if not reopens:
            record.status, record.end_time = "RUNNING", None
            record.tags = {key: value for key, value in record.tags.items() if key not in TAGS_OF_SESSION_END}
        record.params = {key: str(value) for key, value in params.items()} | record.params
        record.tags |= dict(tags) | {TAG_OUTPUT_DIR: str(directory.resolve())}
        record.save(directory)
        self._rows = (directory / METRICS).open("ab", buffering=0)
        self._digest = digest_of(directory / METRICS, self._rows.tell())
        self.flush()

    @property
    def run_id(self) -> str:
        """MLflow's id of the run in the requested experiment; the run's own id as long as MLflow does not have it."""
        return self.record.run_id

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append a row to ``metrics.jsonl``; `flush` delivers it.

        Raises:
            OSError: the disk has no room for the row.
        """
        new = {key: float(value) for key, value in metrics.items() if (key, step) not in self._logged}
        if not new:
            return
        row = json.dumps({"step": step, "time": now_ms(), "metrics": encode(new)}, allow_nan=False).encode() + b"\n"
        if self._rows.write(row) < len(row):  # a disk that becomes full takes only a part of the row
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.directory / METRICS))
        self._digest.update(row)
        self._remember(new, step)

    def _remember(self, metrics: Mapping[str, float], step: int) -> None:
        """Update the record's last values by those metrics that it does not have from a later step."""
        newest = {key: value for key, value in metrics.items() if step >= self._last_step.get(key, -1)}
        self.record.metrics |= newest
        self._last_step |= dict.fromkeys(newest, step)

    @property
    def next_step(self) -> int:
        """The step after the last one that has been logged."""
        return max(self._last_step.values(), default=-1) + 1

    @property
    def written(self) -> tuple[int, str]:
        """The size of the rows in bytes, and their SHA-256."""
        return os.fstat(self._rows.fileno()).st_size, self._digest.hexdigest()

    def sync(self) -> None:
        """Put all rows on the disk, so that not even a power cut loses one; call this before saving a checkpoint.

        Raises:
            CannotWrite: the run's directory has been removed or replaced since the run was opened.
        """
        os.fsync(self._rows.fileno())
        if not self._is_in_place():
            raise CannotWrite(f"{self.directory}: was removed or replaced while the run worked in it, so the run stops")

    def _is_in_place(self) -> bool:
        """Whether the path still names the open file; the lock does not tell, because it moves with its folder."""
        try:
            return os.path.samestat(os.fstat(self._rows.fileno()), (self.directory / METRICS).stat())
        except OSError:
            return False

    def flush(self) -> None:
        """Deliver what MLflow lacks. A store that fails or is slow costs at most a tenth of the training time."""
        self.sync()  # so that the store never gets a row that the file could still lose
        if time.monotonic() >= self._retry_at:
            self._deliver()
        self._save()

    def artifact(self, path: Path) -> None:
        """Deliver a file of the output directory, which replaces its earlier version in MLflow."""
        name = os.path.relpath(path, self.directory)
        if name not in self.record.artifacts:
            self.record.artifacts.append(name)
        if self._delivery:
            self._delivery.artifacts.discard(name)
        self.flush()

    def watch_system(self) -> None:
        """Have MLflow log system metrics until `close`, if ``tracking.system_metrics`` is set; the files lack them."""
        if not self.tracking.system_metrics:
            return
        try:
            run_id = self.record.entry.run_id
            if not run_id:
                raise Overdue("it does not have the run so far")
            self._end_watch = within(mlflow_store.STORE_TIMEOUT_S, lambda: mlflow_store.watch_system(run_id))
        except Exception as error:
            logger.warning("MLflow takes no system metrics of this session: %s", one_line(error))

    def close(self, status: Status) -> None:
        """End the run, here and in MLflow; a run that was told to stop does not wait for a store that fails.

        Raises:
            OSError: the disk has no room for the record of a finished run. Any other status then reaches MLflow only.
        """
        with suppress(Exception):
            if self._end_watch:
                Call(self._end_watch).result(self._patience)
        self.record.close(status)
        self.record.end_time = self._ended or self.record.end_time
        if not self._is_in_place():  # the files there now belong to another process; MLflow keeps what it has
            with suppress(Exception):
                if self._delivery:
                    self._delivery.terminate()
            self._rows.close()
            return
        try:
            self._save()
        except OSError:
            if status == "FINISHED":
                raise
        waits = status == "KILLED" and self._fails and time.monotonic() < self._retry_at
        if waits or not self._deliver():
            logger.warning(
                "MLflow lacks a part of this run; deliver it with: python -m src.tracking %s", self.directory
            )
        with suppress(OSError):
            self._save()
        self._rows.close()

    def _save(self) -> None:
        if self._ended is None:
            self.record.seconds = time.monotonic() - self._opened
        self.record.rows = self.written
        self.record.save(self.directory)

    def _deliver(self) -> bool:
        """Deliver within the deadline, and return whether MLflow now has everything.

        This process never makes two deliveries at once: a delivery that exceeded its deadline goes on in its thread,
        and the next one first waits for it. It ends with the process at the latest, before the run's lock is free, so a
        later command never works beside it. What it has sent by then is harmless: the store drops an exact repeat of a
        value, params do not change, and the record does not count it as delivered, so that tags and status are sent
        again.
        """
        if self.tracking.name != "mlflow":
            return True
        started = time.monotonic()
        try:
            if self._call is not None and self._call.is_running:  # a delivery that has exceeded its deadline
                self._call.result(self._patience)
            self._call = Call(self._push)
            self._call.result(self._patience)
        except Exception as error:  # whatever has failed, training goes on
            self._retry_at = time.monotonic() + 10 * (time.monotonic() - started)
            if not self._warned:
                logger.warning("MLflow does not take rows, they are kept in %s: %s", METRICS, one_line(error))
            self._warned = self._fails = True
            return False
        self._fails = False
        if time.monotonic() - started > SLOW_DELIVERY_S:
            self._retry_at = time.monotonic() + 10 * (time.monotonic() - started)
        return True

    def _patience(self) -> float:
        """The deadline in seconds of a delivery, which shrinks when the run is told to stop."""
        return STOPPING_TIMEOUT_S if self.is_stopping() else mlflow_store.STORE_TIMEOUT_S

    def _push(self) -> None:
        client, record = self.client(), self.record
        if self._delivery is None:
            self._delivery = mlflow_store.Delivery(client, record, record.experiment, requested=True)
            is_unknown = self._delivery.run is None and record.entry.run_id != ""
            self._gone = self._reopens and (self._delivery.is_deleted or is_unknown)
            if self._gone:
                logger.warning("%s", deleted_in_mlflow([self.directory]))
        if self._gone:
            return
        self._delivery.push()
        if record.status != "RUNNING":
            for _ in mlflow_store.deliver(client, record):  # to the experiments in which it was requested before
                pass

    def client(self) -> Any:
        """MLflow's client, for which the store is opened once; None with ``tracking=jsonl``.

        Raises:
            UsageError: the store does not open or, as `src.runs.mlflow_store.Busy`, does not open now.
        """
        if self._client is None and self.tracking.name == "mlflow":
            self._client = mlflow_store.open_store(self.tracking.experiment)
        return self._client


class NoTracker(Tracker):
    """A tracker that writes nothing, for every rank but the first."""

    def __init__(self, directory: Path, tracking: Tracking, *_: object, **__: object) -> None:
        self.directory, self.record = directory, Record.new(directory.name, tracking.experiment)

    def _pass(self, *_: object, **__: object) -> None:
        pass

    log = sync = flush = artifact = watch_system = close = _pass


def parent_tags(parent: str | None, experiment: str) -> dict[str, str]:
    """The tags that nest a run, in an experiment in which it is requested, under the sweep whose folder is ``parent``.

    There are none without a sweep, or if its folder is not here: a job's recorded command runs anywhere.

    Raises:
        UsageError: the folder is not that of a sweep.
    """
    record = Record.find(Path(parent)) if parent else None
    if record is None:
        return {}
    if TAG_SWEEP_ID not in record.tags:
        raise UsageError(f"tracking.parent={parent}: is not the folder of a sweep; leave it out")
    tags = {f"sweep.{record.tags[TAG_SWEEP_ID]}": "true"}
    # Else the sweep is of another experiment, or MLflow lacks it so far, and `attach_children` adds the tag at its end.
    if (entry := record.copies.get(experiment)) and entry.run_id:
        tags[TAG_PARENT] = entry.run_id
    return tags


def deleted_in_mlflow(directories: Sequence[Path]) -> str:
    """Say which command restores runs that were deleted in MLflow, or whose store was replaced by another."""
    what = "this run" if len(directories) == 1 else f"{len(directories)} runs"
    folders = shlex.join(map(str, directories))
    return (
        f"MLflow no longer has {what} (deleted, or another store); deliver again with: python -m src.tracking {folders}"
    )


def mark_failed(directory: Path, reason: str) -> None:
    """Mark a run as failed whose process ended without closing it."""
    record = Record.load(directory)
    record.close("FAILED", reason)
    record.save(directory)
