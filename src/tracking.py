"""Where a run's numbers go: into ``metrics.jsonl`` first, and from there to MLflow.

Two files in the output directory are the truth: ``metrics.jsonl``, append-only, one row a logged step, and
``run.json``, the run's name, params, tags, status and last values. MLflow is a place they are delivered to. Its SQL
store drops an exact repeat of (key, time, step, value), so delivering a row twice changes nothing, and whatever a kill
or an outage cut off is simply delivered again: at the next flush, on resume, or by hand with
``python -m src.tracking OUTPUT_DIR``.

This is the only file that imports mlflow, and it does so late: the import takes seconds, and a run with
``tracking=jsonl`` does not need the package.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import math
import os
import platform
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from src.config import Tracking
from src.errors import UsageError

METRICS = "metrics.jsonl"
RECORD = "run.json"

logger = logging.getLogger(__name__)


@dataclass
class Record:
    """What ``run.json`` holds. Times are in milliseconds since the epoch, as in MLflow."""

    uuid: str
    run_id: str  # MLflow's; `uuid` until MLflow has the run
    name: str
    experiment: str
    start_time: int
    end_time: int | None = None
    seconds: float = 0.0  # worked on it, in all its sessions
    status: str = "RUNNING"
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)  # the last value of each
    artifacts: list[str] = field(default_factory=list)  # relative to the output directory
    delivered_bytes: int = 0  # how much of metrics.jsonl MLflow has
    delivered_artifacts: int = 0

    @classmethod
    def new(cls, name: str, experiment: str) -> Record:
        identity = uuid.uuid4().hex
        return cls(identity, identity, name, experiment, _now())

    @classmethod
    def load(cls, directory: Path) -> Record:
        path = directory / RECORD
        try:
            record = cls(**json.loads(path.read_text()))
            record.metrics = {key: float(value) for key, value in record.metrics.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is not the record of a run ({_one_line(error)}): name another folder") from None
        return record

    def save(self, directory: Path) -> None:
        values = asdict(self) | {"metrics": _encode(self.metrics)}
        aside = directory / f"{RECORD}.tmp"
        aside.write_text(json.dumps(values, indent=1, allow_nan=False))
        os.replace(aside, directory / RECORD)


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
        self._client = prepare_store(tracking.experiment) if tracking.name == "mlflow" else None
        self._connected = self._warned = False
        self._retry_at = 0.0

        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        continued = (directory / RECORD).exists()
        self.record = record = Record.load(directory) if continued else Record.new(run_name, tracking.experiment)
        rows, end = _cut_and_read(directory / METRICS)
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
        row = {"step": step, "time": _now(), "metrics": _encode(new)}
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
        self.record.status, self.record.end_time = status, _now()
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
                _connect(self._client, self.directory, self.record)
                self._connected = True
            if self._client:
                _push(self._client, self.directory, self.record)
        except Exception as error:  # whatever it is, training matters more
            self._retry_at = time.monotonic() + 10 * (time.monotonic() - started)
            if not self._warned:
                logger.warning("MLflow does not take rows, they are kept in %s: %s", METRICS, _one_line(error))
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
    client = prepare_store(record.experiment)
    record.delivered_bytes = record.delivered_artifacts = 0
    try:
        _connect(client, directory, record)
        _push(client, directory, record)
    except Exception as error:
        raise UsageError(f"MLflow does not take {directory} ({_one_line(error)}): try again later") from None
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
                [_experiment_id(parent._client, record.experiment)], f"tags.uuid = '{record.uuid}'", max_results=1
            )
            if not found or found[0].info.status != record.status:
                deliver(directory)
                continue
            for key, value in record.tags.items():
                if found[0].data.tags.get(key) != value:
                    parent._client.set_tag(found[0].info.run_id, key, value)
    except Exception as error:
        logger.warning("MLflow could not be told which runs belong to %s: %s", parent.directory, _one_line(error))


def share(parent: Tracker, view: Callable[[str, str, str, int], tuple[str, str, str]]) -> str:
    """Tags the experiment with a view of a sweep's jobs; returns where MLflow shows it, empty where there is no MLflow.

    Args:
        view: `src.charts.sweep_view`.
    """
    if not parent._client:
        return ""
    record = parent.record
    try:
        experiment_id = _experiment_id(parent._client, record.experiment)
        key, value, path = view(experiment_id, record.run_id, parent.directory.name, record.start_time)
        parent._client.set_experiment_tag(experiment_id, key, value)
    except Exception as error:
        logger.warning("MLflow does not take the view of %s: %s", parent.directory, _one_line(error))
        return ""
    return path


def abandon(directory: Path, reason: str) -> None:
    """Closes a run, as failed, whose process ended without doing so."""
    record = Record.load(directory)
    record.status, record.end_time = "FAILED", _now()
    record.tags["error"] = reason
    record.save(directory)


def _connect(client: Any, directory: Path, record: Record) -> None:
    """Finds the record's run in the store or creates it, and hands over its params and tags.

    It is found by the uuid that it is tagged with, not by its id: a run whose creator was killed before it could write
    the id down is found too, and one that the store no longer has, or never had, is created and delivered whole.
    """
    from mlflow.entities import Param, RunTag

    experiment_id = _experiment_id(client, record.experiment)
    found = client.search_runs([experiment_id], f"tags.uuid = '{record.uuid}'", max_results=1)
    if found:
        run = found[0]
    else:
        tags = {"uuid": record.uuid}
        run = client.create_run(experiment_id, start_time=record.start_time, tags=tags, run_name=record.name)
        record.delivered_bytes = record.delivered_artifacts = 0
    record.run_id = run.info.run_id
    record.save(directory)
    client.log_batch(
        record.run_id,
        params=[Param(key, value) for key, value in record.params.items()],
        tags=[RunTag(key, value) for key, value in record.tags.items()],
    )
    client.update_run(record.run_id, status="RUNNING")


def _push(client: Any, directory: Path, record: Record) -> None:
    """Brings the store's run up to the files. Harmless when repeated."""
    from mlflow.entities import Metric

    rows, end = _read_rows(directory / METRICS, record.delivered_bytes)
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


def _experiment_id(client: Any, name: str) -> str:
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


def prepare_store(experiment: str = "Default") -> Any:
    """Opens the MLflow store, creates a local one that is not there yet, and returns the client.

    The store is what MLFLOW_TRACKING_URI names, or ``mlflow.db`` in the current folder, which is what ``mlflow ui``
    shows. MLflow creates a SQLite store in dozens of migrations, and two processes that do it at once, or one that is
    killed meanwhile, leave a file that never opens again. So it is created under a lock, aside, and renamed.

    Only a local store is opened here, and must open. A server that does not answer yet may do so later in the run.

    Raises:
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
        remedy = "move it away, set MLFLOW_TRACKING_URI, or use tracking=jsonl"
        raise UsageError(f"the MLflow store {uri} does not open ({_one_line(error)}): {remedy}") from None
    if found and found.lifecycle_stage == "deleted":
        remedy = f"run `mlflow experiments restore -x {found.experiment_id}`, or choose another tracking.experiment"
        raise UsageError(f"the experiment {experiment!r} has been deleted in {uri}: {remedy}")
    return client


def _import_mlflow() -> Any:
    quiet = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # it logs a traceback of each failure that is handled here
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # the next flush is the retry: do not stop training for minutes
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    try:
        import mlflow
    except ImportError as error:
        remedy = "run `make setup`, or use tracking=jsonl"
        raise UsageError(f"tracking=mlflow cannot import MLflow ({_one_line(error)}): {remedy}") from None
    return mlflow


def _sqlite_path(uri: str) -> Path | None:
    if not uri.startswith("sqlite:///") or uri.endswith(":memory:"):
        return None
    return Path(uri.removeprefix("sqlite:///").partition("?")[0])


@dataclass(frozen=True)
class Run:
    """A run as it is listed: params as text, the last value of each metric, the start in seconds since the epoch."""

    run_id: str
    name: str
    status: str
    params: dict[str, str]
    metrics: dict[str, float]
    directory: str | None
    tags: dict[str, str]
    start_time: float


def read_runs(experiment: str, backend: str, root: Path = Path("multirun")) -> list[Run]:
    """Lists an experiment's runs, oldest first, from MLflow or from the ``run.json`` files under ``root``.

    Raises:
        UsageError: there is no such experiment; the message lists those that there are.
    """
    runs = _runs_in_store(experiment) if backend == "mlflow" else _runs_under(root, experiment)
    return sorted((run for run in runs if "sweep_id" not in run.tags), key=lambda run: run.start_time)


def read_sweep(sweep: str, backend: str, root: Path = Path("multirun")) -> tuple[str, list[Run]]:
    """Lists a sweep's jobs, oldest first.

    Args:
        sweep: its eight hex digits, or the id of its run in MLflow.

    Returns:
        The sweep's name, and the runs.

    Raises:
        UsageError: there is no such sweep; the message lists those that there are.
    """
    if backend == "mlflow":
        names = [experiment.name for experiment in _existing_store().search_experiments()]
        runs = [run for name in names for run in _runs_in_store(name)]
    else:
        runs = [_as_run(Record.load(path.parent)) for path in root.rglob(RECORD)]
    sweeps = {run.tags["sweep_id"]: run for run in runs if "sweep_id" in run.tags}
    for identity, run in sweeps.items():
        if sweep in (identity, run.run_id):
            jobs = [each for each in runs if f"sweep.{identity}" in each.tags]
            return run.params["sweep"], sorted(jobs, key=lambda each: each.start_time)
    known = ", ".join(f"{identity} ({run.params['sweep']})" for identity, run in sweeps.items())
    raise UsageError(f"sweep={sweep}: there is no such sweep; choose from {known or 'none'}")


def _runs_under(root: Path, experiment: str) -> list[Run]:
    records = [Record.load(path.parent) for path in root.rglob(RECORD)]
    runs = [_as_run(record) for record in records if record.experiment == experiment]
    if not runs:
        raise _unknown(experiment, f"the run.json files under {root}/", {record.experiment for record in records})
    return runs


def _as_run(r: Record) -> Run:
    return Run(r.run_id, r.name, r.status, r.params, r.metrics, r.tags["output_dir"], r.tags, r.start_time / 1000)


def run_in(directory: Path) -> Run:
    """The run in an output directory.

    Raises:
        UsageError: there is none.
    """
    return _as_run(Record.load(directory))


def _runs_in_store(experiment: str) -> list[Run]:
    client = _existing_store()
    try:
        found = client.get_experiment_by_name(experiment)
        names = {} if found else {other.name for other in client.search_experiments()}
        pages = [client.search_runs([found.experiment_id])] if found else []
        while pages and pages[-1].token:
            pages.append(client.search_runs([found.experiment_id], page_token=pages[-1].token))
    except Exception as error:
        raise UsageError(f"the MLflow store does not answer ({_one_line(error)}): see MLFLOW_TRACKING_URI") from None
    if not found:
        raise _unknown(experiment, "MLflow", names)
    return [
        Run(
            run.info.run_id,
            run.info.run_name,
            run.info.status,
            run.data.params,
            run.data.metrics,
            run.data.tags.get("output_dir"),
            run.data.tags,
            run.info.start_time / 1000,
        )
        for page in pages
        for run in page
    ]


def _unknown(experiment: str, where: str, known: Iterable[str]) -> UsageError:
    return UsageError(f"experiment={experiment} is not in {where}: choose from {', '.join(sorted(known)) or 'none'}")


def _existing_store() -> Any:
    """The client, unless that would create a store in a folder which has none."""
    uri = _import_mlflow().get_tracking_uri()
    path = _sqlite_path(uri)
    if path and not path.exists():
        raise UsageError(f"there is no MLflow store at {path}: change to the project root, or set MLFLOW_TRACKING_URI")
    return prepare_store()


def find_run_directory(run_id: str, root: Path = Path("multirun")) -> Path:
    """The output directory of a run, by the ``run.json`` files under ``root``, else by the run's tag in MLflow.

    Raises:
        UsageError: no run has the id, or its folder is gone.
    """
    for path in root.rglob(RECORD):
        record = Record.load(path.parent)
        if run_id in (record.run_id, record.uuid):
            return path.parent
    client = _existing_store()
    try:
        tags = client.get_run(run_id).data.tags
    except Exception as error:
        raise UsageError(f"run_id={run_id} is not in MLflow ({_one_line(error)}), nor under {root}/") from None
    directory = tags.get("output_dir", "")
    if not directory or not Path(directory).is_dir():
        raise UsageError(f"run_id={run_id} has no folder here (output_dir={directory!r}): pass checkpoint=PATH instead")
    return Path(directory)


def environment_tags(device: str) -> dict[str, str]:
    """What a result depends on besides its config: code, versions, device and command. No host, user or secret.

    Args:
        device: what the run computes on, as torch names it (``cpu``, ``cuda:0``).
    """
    import torch

    tags = {"python": platform.python_version(), "command": shlex.join(sys.argv)}
    tags["device"] = (
        torch.cuda.get_device_name(device) if "cuda" in device else f"{device} ({torch.get_num_threads()} threads)"
    )
    for package in ("torch", "torchvision", "mlflow", "faiss-cpu", "faiss-gpu"):
        try:
            tags[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = _git("rev-parse", "HEAD")
    tags |= {"mlflow.source.name": Path(sys.argv[0]).name, "mlflow.source.type": "LOCAL"}  # a column of MLflow's
    if commit:
        tags["git_commit"] = tags["mlflow.source.git.commit"] = commit
        tags["git_dirty"] = str(bool(_git("status", "--porcelain", "--", "src", "conf"))).lower()
    return tags


def _git(*arguments: str) -> str:
    """The output of git in the project's folder, empty where there is no git or no repository."""
    root = Path(__file__).parent.parent
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _cut_and_read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Removes a last row that a kill cut short; the rows, and the length of the file."""
    path.touch()
    rows, end = _read_rows(path)
    os.truncate(path, end)
    return rows, end


def _read_rows(path: Path, start: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The complete rows from byte ``start``, and the byte after the last of them."""
    with path.open("rb") as file:
        file.seek(start)
        data = file.read()
    complete = data[: data.rfind(b"\n") + 1]
    try:
        return [json.loads(line) for line in complete.splitlines()], start + len(complete)
    except ValueError as error:
        raise UsageError(f"{path} holds a damaged row ({error}): remove that row") from None


def _encode(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """JSON has no NaN and no infinity: they are written as text, which ``float`` reads back."""
    return {key: value if math.isfinite(value) else str(value) for key, value in metrics.items()}


def _now() -> int:
    return time.time_ns() // 1_000_000


def _one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


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
