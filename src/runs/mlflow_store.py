"""MLflow's store: opening it, and bringing a run in it up to date with the run's files.

Only this file imports mlflow, and it does so late, because the import takes seconds and a run with ``tracking=jsonl``
does not need the package.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from filelock import FileLock

from src.config.identity import LOG_SIZE
from src.errors import UsageError
from src.runs.metrics_file import digest_of, read_blocks
from src.runs.record import ENCODER, METRICS, TAG_NOTE, TAG_PARENT, TAGS_OF_SESSION_END, Record
from src.system.deadline import Overdue, within
from src.system.redact import one_line, redact

T = TypeVar("T")
OPEN_ATTEMPTS = 5  # to open a database whose tables another process may be creating
STORE_TIMEOUT_S = 30.0  # how long a run or a command waits for a store, whatever the store does meanwhile
MODEL = "encoder"  # the name of a run's model in MLflow
LOADER = "src.evaluation.encoder"  # the module that loads the model for `mlflow.pyfunc`
_RACE = re.compile("UniqueViolation|DuplicateTable|duplicate key|already exists", re.IGNORECASE)
_AWAY = re.compile("database is locked|connection to server|could not connect|can't connect", re.IGNORECASE)


class StoreError(UsageError):
    """The store does not open, does not take a run, or does not answer in time."""


class Busy(StoreError):  # noqa: N818
    """The store exists, or may exist, but does not answer now."""


def check(experiment: str) -> None:
    """Refuse an unusable store before a run writes anything; a store that is only busy gets the run later.

    Raises:
        UsageError: as in `open_store`, but not if the store is only busy.
    """
    with suppress(Busy):
        prepare(experiment)


def prepare(experiment: str = "Default") -> Any:
    """Call `open_store` with a deadline of `STORE_TIMEOUT_S`, as MLflow retries an unreachable database for minutes.

    Raises:
        Busy: the store does not answer in time, or says that it is busy.
        UsageError: as in `open_store`.
    """
    mlflow = import_mlflow()  # outside the deadline, because the import may take long on a slow disk
    try:
        return within(STORE_TIMEOUT_S, lambda: open_store(experiment))
    except Overdue as error:
        raise Busy(
            f"the MLflow store {redact(store_uri(mlflow))} gives {error}: see MLFLOW_TRACKING_URI, or try again"
        ) from None


def open_store(experiment: str) -> Any:
    """Open the MLflow store, or create it if it is a local one that does not exist, and return the client.

    The store is the one that MLFLOW_TRACKING_URI names, or else ``mlflow.db`` in the current folder, which is what
    ``mlflow ui`` shows. MLflow creates a SQLite store in dozens of migrations, and two processes that do so at once, or
    one that is killed meanwhile, leave a file that never opens again. So the store is created under a lock and under
    another name, and then renamed.

    Only a database must open here. A server is not asked anything, because it may begin to answer later in the run.

    Raises:
        Busy: the database is locked or cannot be reached.
        StoreError: MLflow is not installed, or the store is a folder of files or does not open.
        UsageError: the experiment has been deleted, which is looked up in a SQLite store only.
    """
    mlflow = import_mlflow()
    uri = store_uri(mlflow)
    path = _sqlite_path(uri)
    if path and path.exists() and not path.is_file():  # which MLflow would try to open for minutes
        raise StoreError(f"the MLflow store {redact(uri)} is not a file: set MLFLOW_TRACKING_URI=sqlite:///mlflow.db")
    try:
        is_folder = path is None and mlflow.utils.uri.is_local_uri(uri)
    except ValueError as error:
        raise StoreError(f"MLFLOW_TRACKING_URI={redact(uri)}: is no address ({one_line(error)})") from None
    if is_folder:
        raise StoreError(
            f"the MLflow store {redact(uri)} is a folder of files, in which a value that is delivered twice counts "
            "twice: set MLFLOW_TRACKING_URI=sqlite:///mlflow.db, or use tracking=jsonl"
        )
    try:
        if path is None:
            return _opened(mlflow.MlflowClient, uri)
        if not path.exists():
            _create(path, mlflow.MlflowClient)
        client = mlflow.MlflowClient(uri)
        found = client.get_experiment_by_name(experiment)
    except Exception as error:
        if _AWAY.search(str(error)):
            raise Busy(f"the MLflow store {redact(uri)} does not open now ({one_line(error)}): try again") from None
        remedy = "move it away, set MLFLOW_TRACKING_URI, or use tracking=jsonl"
        raise StoreError(f"the MLflow store {redact(uri)} does not open ({one_line(error)}): {remedy}") from None
    _refuse_deleted(found)
    return client


def _create(path: Path, client: Callable[[str], Any]) -> None:
    """Create a SQLite store, so that its file appears under its name only when all tables are there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():  # another process may have been faster
            aside = path.with_name(f"{path.name}.new")
            aside.unlink(missing_ok=True)
            aside.touch()  # as the umask has it; a file that SQLite creates is writable for its owner only
            client(f"sqlite:///{aside}")
            os.replace(aside, path)


def _opened(client: Callable[[str], Any], uri: str) -> Any:
    """Open a client of a server or of a database other than SQLite; retry while another process creates the tables.

    Such a database creates its tables in one transaction: of two processes that create them at once, the second gets an
    error when the first one has finished.
    """
    for _ in range(OPEN_ATTEMPTS - 1):
        try:
            return client(uri)
        except Exception as error:
            if not _RACE.search(f"{type(error).__name__} {error}"):
                raise
            time.sleep(1)
    return client(uri)


def _refuse_deleted(experiment: Any) -> None:
    if experiment and experiment.lifecycle_stage == "deleted":
        remedy = f"run `mlflow experiments restore -x {experiment.experiment_id}`, or choose another"
        raise UsageError(f"the experiment {experiment.name!r} has been deleted in MLflow: {remedy} tracking.experiment")


def import_mlflow() -> Any:
    """Import MLflow, set to print little and to fail soon unless the user has set its variables otherwise.

    Raises:
        StoreError: MLflow cannot be imported.
    """
    quiet = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # else it logs a traceback of each failure that is handled here
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the next flush tries again; training must not wait for minutes
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",  # else it waits as long as a server asks
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # else it logs a warning of each attempt
    try:
        import mlflow
        import mlflow.utils.file_utils
        import mlflow.utils.uri
    except (ImportError, RuntimeError) as error:  # RuntimeError if the user has no home folder
        remedy = "run `make setup`, or use tracking=jsonl"
        raise StoreError(f"tracking=mlflow cannot import MLflow ({one_line(error)}): {remedy}") from None
    return mlflow


def store_uri(mlflow: Any) -> str:
    """The store's URI: MLFLOW_TRACKING_URI, or else ``mlflow.db`` in the current folder.

    MLflow would write %20 for a space in the folder's path, which SQLAlchemy takes literally.
    """
    uri: str = mlflow.get_tracking_uri()
    is_here = uri == mlflow.utils.file_utils.path_to_local_sqlite_uri("mlflow.db")
    return f"sqlite:///{Path('mlflow.db').absolute()}" if is_here else uri


def _sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite store; None for any other store, also for one in memory."""
    if not uri.startswith("sqlite:///") or uri.endswith(":memory:"):
        return None
    return Path(uri.removeprefix("sqlite:///").partition("?")[0])


def existing() -> Any:
    """Open the store and return the client, but do not create a store in a folder that has none.

    Raises:
        UsageError: there is no store, or as in `prepare`.
    """
    if path := missing():
        raise UsageError(f"there is no MLflow store at {path}: change to the project root, or set MLFLOW_TRACKING_URI")
    return prepare()


def missing() -> Path | None:
    """The path of the SQLite store that `open_store` would create; None if it is there, or for any other store.

    Raises:
        StoreError: MLflow cannot be imported.
    """
    path = _sqlite_path(store_uri(import_mlflow()))
    return path if path and not path.exists() else None


def answer(request: Callable[[], T]) -> T:
    """Return the store's answer to a request, for a command that cannot continue without it.

    Raises:
        StoreError: the store refuses the request, or does not answer within `STORE_TIMEOUT_S`.
    """
    try:
        return within(STORE_TIMEOUT_S, request)
    except Exception as error:
        raise StoreError(f"the MLflow store does not answer ({one_line(error)}): see MLFLOW_TRACKING_URI") from None


def call_for_run(directory: Path, seconds: float, request: Callable[[Any], T]) -> T:
    """Open the store, call ``request(client)``, which sends something of a run, and return the result.

    Args:
        directory: the run's folder, for the message.
        seconds: how long to wait for the result.
        request: a function of MLflow's client.

    Raises:
        StoreError: the store does not open, refuses, or does not answer in time.
        UsageError: by the request itself.
    """
    with _errors_of_run(directory):
        client = prepare()
        return within(seconds, lambda: request(client))


def iterate_for_run(directory: Path, seconds: float, request: Callable[[Any], Iterator[T]]) -> Iterator[T]:
    """Do the same as `call_for_run` for a request that yields after each step; each step may take ``seconds``."""
    with _errors_of_run(directory):
        steps = request(prepare())
        while (found := within(seconds, lambda: next(steps, None))) is not None:
            yield found


@contextmanager
def _errors_of_run(directory: Path) -> Iterator[None]:
    """Inside this block, turn every other error into a `UsageError` that names the run's folder.

    It is a `StoreError` unless MLflow has answered that a request, such as a metric's name, is not valid.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        is_of_run = getattr(error, "error_code", None) in ("BAD_REQUEST", "INVALID_PARAMETER_VALUE")
        refusal = f"MLflow does not take {directory} ({one_line(error)})"
        if is_of_run:
            raise UsageError(f"{refusal}: change that in the run's files") from None
        raise StoreError(f"{refusal}: try again later") from None


def known_run(client: Any, run_id: str) -> Any:
    """MLflow's run of an id; None if the store does not know the id, or if it is empty or malformed."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id) if run_id else None
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def _experiment_for(client: Any, name: str, parent: Any) -> str:
    """The id of the experiment in which to create a run: the one of that name, which is created if necessary.

    If no experiment has the name but the run's sweep is in MLflow, the sweep's experiment has been renamed, and the run
    is created there.

    Args:
        client: MLflow's.
        name: of the requested experiment.
        parent: the sweep's run in MLflow; None: there is none.

    Raises:
        UsageError: the experiment has been deleted.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if not found and parent and parent.info.lifecycle_stage == "active":
        return parent.info.experiment_id
    if not found:
        try:
            return client.create_experiment(name)
        except MlflowException:  # another process has just created it, or the store is down
            found = client.get_experiment_by_name(name)
            if not found:
                raise
    _refuse_deleted(found)
    return found.experiment_id


class Delivery:
    """The delivery of a run to one of the experiments in which it was requested.

    `push` brings MLflow up to date with the run's files. MLflow's run is found by the id in the record, even if its
    experiment has been renamed; or else by the tag with the run's uuid, because the process that created MLflow's run
    may have been killed before it could save the id.

    Args:
        client: MLflow's.
        record: of a run that has a directory.
        experiment: the name of the experiment.
        requested: whether the user requests the experiment now. If its name now belongs to another experiment, the run
            is delivered to that one, and the record keeps both.
    """

    def __init__(self, client: Any, record: Record, experiment: str, requested: bool = False) -> None:
        self.client, self.record, self.experiment = client, record, experiment
        assert record.directory
        self.directory, self.entry = record.directory, record.copies[experiment]
        self.is_connected = False
        # What has been sent, so that no flush sends it again; of the rows, the number of bytes and their digest.
        self.bytes, self.digest = 0, hashlib.sha256()
        self.tags, self.artifacts = dict[str, str](), set[str]()

        named = client.get_experiment_by_name(experiment)
        there = named.experiment_id if named and named.lifecycle_stage == "active" else None
        self.run = run = self._find_run(there, requested)
        # Deleted in MLflow's pages, or lost together with the store that had the run.
        self.is_deleted = run.info.lifecycle_stage == "deleted" if run else self.is_whole or bool(named and not there)
        self.entry.experiment_id = run.info.experiment_id if run and not self.is_deleted else ""

    def _find_run(self, there: str | None, requested: bool) -> Any:
        """Find MLflow's run by its id, or else by its uuid in the experiment that has the name now; None: not found.

        Args:
            there: the id of the experiment that has the name; None: there is none, or it has been deleted.
            requested: as in the constructor.
        """
        client, entry = self.client, self.entry
        if run := known_run(client, entry.run_id):
            is_deleted = run.info.lifecycle_stage == "deleted"
            if requested and there and run.info.experiment_id != there:  # the run's experiment has been renamed
                if not is_deleted:
                    tags = {key: run.data.tags[key] for key in entry.tags if key in run.data.tags}
                    home = client.get_experiment(run.info.experiment_id)
                    renamed = {home.name: replace(entry, tags=tags)}
                    self.record.copies = renamed | self.record.copies  # a new dict: a save may be reading the old one
                entry.begin("")
            elif not is_deleted or client.get_experiment(run.info.experiment_id).lifecycle_stage != "deleted":
                return run  # but not a deleted run in a deleted experiment: restoring the run alone would not show it
        found = client.search_runs([there], f"tags.uuid = '{self.record.uuid}'", max_results=1) if there else []
        if found:
            entry.begin(found[0].info.run_id)
        return next(iter(found), None)

    @property
    def is_whole(self) -> bool:
        """Whether MLflow has everything of the run in this experiment."""
        return self.entry.has == self.record.state(self.experiment)

    def push(self) -> None:
        """Deliver everything, by running all `steps`."""
        for _ in self.steps():
            pass

    def steps(self) -> Iterator[None]:
        """Deliver what has not been sent yet, and yield after each of many short steps.

        Repeating a step is harmless, also in another process: the store drops what it already has.

        Raises:
            UsageError: the experiment has been deleted, or an artifact is not a file of the run's folder.
        """
        from mlflow.entities import Metric, Param, RunTag

        client, record, entry = self.client, self.record, self.entry
        artifacts = record.artifact_paths(besides=self.artifacts)
        params = {} if self.is_connected else record.params | log_size(record.params)
        if not self.is_connected:
            self._connect()
        tags = record.tags | entry.tags
        client.log_batch(  # it splits them into requests of at most 1,000 items
            entry.run_id,
            params=[Param(key, value) for key, value in params.items()],
            tags=[RunTag(key, value) for key, value in tags.items() if self.tags.get(key) != value],
        )
        if params:
            self._log_data(params)
        self.is_connected, self.tags = True, tags
        yield
        for rows, content in read_blocks(self.directory / METRICS, self.bytes):
            pairs = [(row, each) for row in rows for each in row["metrics"].items()]
            values = [Metric(*each, row["time"], row["step"]) for row, each in pairs]
            client.log_batch(entry.run_id, values, synchronous=True)  # because the record notes them as delivered next
            self.bytes += len(content)
            self.digest.update(content)
            entry.rows = self.bytes, self.digest.hexdigest()
            yield
        for name, path in artifacts.items():
            if name != ENCODER or not self._log_model(path):
                client.log_artifact(entry.run_id, str(path), os.path.dirname(name) or None)
            self.artifacts.add(name)
            yield
        if record.status != "RUNNING":
            self.terminate()
        entry.has = record.state(self.experiment)

    def _log_data(self, params: Mapping[str, str]) -> None:
        """Log the data set as an input of the run, if it is known; MLflow drops an exact repeat."""
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.exceptions import MlflowException

        known = _data_set(params)
        if not known:
            return
        described = MetaDataset(_data_source(params), *known).to_dict()
        data = DatasetInput(Dataset(**described), [InputTag("mlflow.data.context", "training")])
        try:
            self.client.log_inputs(self.entry.run_id, [data])
        except MlflowException:  # another job of the sweep has just created the data set, or the store is down
            self.client.log_inputs(self.entry.run_id, [data])

    def _log_model(self, encoder: Path) -> bool:
        """Log the encoder as a model of the run, with its signature and test metrics; repeating this completes it.

        Returns:
            False, with nothing logged, if the server knows no models.
        """
        from mlflow.entities import LoggedModelOutput, Metric
        from mlflow.exceptions import MlflowException
        from mlflow.models import Model, ModelSignature
        from mlflow.pyfunc import add_to_model

        client, run_id, params, home = self.client, self.entry.run_id, self.record.params, self.entry.experiment_id
        size, count = (_number(params, key) or -1 for key in ("data.image_size", "encoder_features"))  # -1: any
        takes, gives = [-1, 3, size, size], [-1, count]
        try:
            found = client.search_logged_models([home], f"source_run_id = '{run_id}'", max_results=1)
        except MlflowException as error:
            if error.error_code != "ENDPOINT_NOT_FOUND":  # a server of MLflow 2 has no logged models
                raise
            return False
        note = {TAG_NOTE: _describe_model(run_id, takes, gives)}
        model = next(iter(found), None) or client.create_logged_model(home, MODEL, run_id, note, params)
        model_id = model.model_id
        with tempfile.TemporaryDirectory() as folder:
            signature = {"inputs": _tensor("uint8", takes), "outputs": _tensor("float32", gives)}
            described = Model(run_id=run_id, model_id=model_id, model_uuid=model_id)
            described.signature = ModelSignature.from_dict(signature)
            add_to_model(described, LOADER, data=encoder.name)
            described.save(f"{folder}/MLmodel")
            for path in (encoder, f"{folder}/MLmodel"):
                client.log_model_artifact(model_id, str(path))
        figures, step = dict[str, Metric](), 0
        for row in chain.from_iterable(rows for rows, _ in read_blocks(self.directory / METRICS)):
            step = row["step"]
            for key, value in row["metrics"].items():
                if key.startswith("test"):
                    figures[key] = Metric(key, value, row["time"], step, model_id, *_data_set(params))
        client.log_batch(run_id, list(figures.values()))
        if model_id not in {each.model_id for each in client.get_run(run_id).outputs.model_outputs}:
            client.log_outputs(run_id, [LoggedModelOutput(model_id, step)])
        client.finalize_logged_model(model_id, "READY")
        return True

    def terminate(self) -> None:
        """Tell MLflow how the run ended."""
        self.client.set_terminated(self.entry.run_id, self.record.status, self.record.end_time)

    def _connect(self) -> None:
        """Create the run in MLflow, or take up the one that is there, which is restored if it was deleted."""
        client, record, entry = self.client, self.record, self.entry
        if self.run is None:
            home = _experiment_for(client, self.experiment, known_run(client, entry.tags.get(TAG_PARENT, "")))
            tags = {"uuid": record.uuid}
            self.run = client.create_run(home, start_time=record.start_time, tags=tags, run_name=record.name)
            entry.begin(self.run.info.run_id)
        elif self.is_deleted:
            client.restore_run(self.run.info.run_id)
            entry.begin(self.run.info.run_id)
        self.is_deleted = False
        entry.experiment_id, entry.has = self.run.info.experiment_id, ""
        size, digest = entry.rows or (0, "")
        there = digest_of(self.directory / METRICS, size)
        if there.hexdigest() == digest:  # else the rows have been changed or cut since, and all are sent again
            self.bytes, self.digest = size, there
        for tag in TAGS_OF_SESSION_END:
            if tag in self.run.data.tags and tag not in record.tags:
                client.delete_tag(entry.run_id, tag)
                del self.run.data.tags[tag]
        if record.status == "RUNNING":
            client.update_run(entry.run_id, status="RUNNING")


def _tensor(dtype: str, shape: Sequence[int]) -> str:
    """The inputs or the outputs of a model's signature, in MLflow's JSON."""
    return json.dumps([{"type": "tensor", "tensor-spec": {"dtype": dtype, "shape": shape}}])


def _describe_model(run_id: str, takes: Sequence[int], gives: Sequence[int]) -> str:
    """The description of a run's model, in Markdown, with the shapes of its inputs and outputs."""
    return (
        f"It takes images, uint8 {takes}, normalises them itself, and gives features, float32 {gives}; -1 stands for "
        "any number. In the project's folder, this line gives the features of images: "
        f'`mlflow.pyfunc.load_model("runs:/{run_id}/{MODEL}").predict(images)`'
    )


def _data_set(params: Mapping[str, str]) -> tuple[str, ...]:
    """The data set's name and digest (at most 36 characters); an empty tuple if they are not known."""
    name, digest = params.get("data.name"), params.get("data.fingerprint")
    return (name, digest[:36]) if name and digest else ()


def _data_source(params: Mapping[str, str]) -> Any:
    """The source of the images for MLflow: a repository of the Hugging Face hub, a folder, or a package's code."""
    from mlflow.data import sources
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.huggingface_dataset_source import HuggingFaceDatasetSource

    if repo := params.get("data.repo"):
        config, split, revision = (params.get(f"data.{key}") for key in ("config", "train_split", "revision"))
        return HuggingFaceDatasetSource(repo, config, split=split or "train", revision=revision)
    if root := params.get("data.root"):
        return sources.LocalArtifactDatasetSource(root)
    return CodeDatasetSource({"mlflow.source.name": params.get("data._target_", params["data.name"])})


def watch_system(run_id: str) -> Callable[[], None]:
    """Start MLflow's own thread, which logs system metrics to the run; return the function that stops it."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=store_uri(import_mlflow()))
    monitor.start()
    return monitor.finish


def log_size(params: Mapping[str, str]) -> dict[str, str]:
    """The decimal logarithm of the support-set size as a param, 0 if nothing is stored; empty without a size."""
    size = _number(params, "support_set_size")
    return {} if size is None else {LOG_SIZE: f"{math.log10(max(1, size)):.3f}"}


def _number(params: Mapping[str, str], key: str) -> int | None:
    """A param as an integer; None if the record lacks it or, after an edit, holds something else."""
    text = params.get(key, "")
    return int(text) if re.fullmatch(r"\d{1,18}", text, re.ASCII) else None


class Delivered(NamedTuple):
    """The outcome of a delivery."""

    run_ids: list[str]  # MLflow's ids of the runs that were sent
    stays_deleted: bool  # whether a run that was deleted in MLflow has been left deleted


def deliver(client: Any, record: Record, requested: str = "", again: bool = False) -> Iterator[Delivered]:
    """Deliver what MLflow lacks of a run that has ended, in each experiment in which it was requested.

    Args:
        client: MLflow's.
        record: of the run.
        requested: the experiment that the user requests now; empty: none.
        again: whether to deliver everything once more, and to restore the run where it was deleted in MLflow.

    Yields:
        The outcome so far, after each step and at the end.
    """
    run_ids, stays_deleted = list[str](), False
    for experiment in [name for name, entry in record.copies.items() if entry.for_mlflow]:
        if again:
            record.copies[experiment].rows = None
        delivery = Delivery(client, record, experiment, experiment == requested)
        if delivery.is_deleted and not again:
            stays_deleted = True
        elif again or not delivery.is_whole:
            for _ in delivery.steps():
                yield Delivered(run_ids, stays_deleted)
            run_ids.append(delivery.entry.run_id)
    yield Delivered(run_ids, stays_deleted)
