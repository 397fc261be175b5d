"""MLflow's store: opening it, bringing a run in it up to the run's files, listing what it holds.

This is the only file that imports mlflow, and it does so late: the import takes seconds, and a run with
``tracking=jsonl`` does not need the package.
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
from src.runs.record import ENCODER, METRICS, TAG_ERROR, TAG_NOTE, TAG_PARENT, Record
from src.system.deadline import Overdue, within
from src.system.redact import one_line, redact

T = TypeVar("T")
OPEN_ATTEMPTS = 5  # to open a database whose tables another process may be creating
STORE_TIMEOUT_S = 30.0  # that a run or a command waits for a store, whatever that does meanwhile
MODEL = "encoder"  # the name of a run's model
LOADER = "src.evaluation.encoder"  # the module that loads it for `mlflow.pyfunc`
_RACE = re.compile("UniqueViolation|DuplicateTable|duplicate key|already exists", re.IGNORECASE)
_AWAY = re.compile("database is locked|connection to server|could not connect|can't connect", re.IGNORECASE)


class Busy(UsageError):  # noqa: N818
    """The store is there, or may be, but does not answer now."""


def check(experiment: str) -> None:
    """Refuse what is no store, before a run writes anything; one that is only busy gets the run later.

    Raises:
        UsageError: as `prepare`.
    """
    with suppress(Busy):
        prepare(experiment)


def prepare(experiment: str = "Default") -> Any:
    """`open_store` with a deadline of `STORE_TIMEOUT_S`, because MLflow retries an unreachable database for minutes.

    Raises:
        Busy: the store does not answer in time, or says that it is busy.
        UsageError: as `open_store`.
    """
    mlflow = import_mlflow()  # which may take long on a slow disk
    try:
        return within(STORE_TIMEOUT_S, lambda: open_store(experiment))
    except Overdue as error:
        raise Busy(
            f"the MLflow store {redact(store_uri(mlflow))} gives {error}: see MLFLOW_TRACKING_URI, or try again"
        ) from None


def open_store(experiment: str) -> Any:
    """Open the MLflow store, create a local one that is not there yet, and return the client.

    The store is what MLFLOW_TRACKING_URI names, or ``mlflow.db`` in the current folder, which is what ``mlflow ui``
    shows. MLflow creates a SQLite store in dozens of migrations, and two processes that do it at once, or one that is
    killed meanwhile, leave a file that never opens again. So it is created under a lock, aside, and renamed.

    Only a database is opened here, and must open. A server that does not answer yet may do so later in the run.

    Raises:
        Busy: the database is locked or away.
        UsageError: MLflow is not installed, the store is a folder of files or does not open, or the experiment has been
            deleted in it.
    """
    mlflow = import_mlflow()
    uri = store_uri(mlflow)
    path = _sqlite_path(uri)
    if path and path.exists() and not path.is_file():  # MLflow would try for minutes
        raise UsageError(f"the MLflow store {redact(uri)} is not a file: set MLFLOW_TRACKING_URI=sqlite:///mlflow.db")
    try:
        is_folder = path is None and mlflow.utils.uri.is_local_uri(uri)
    except ValueError as error:
        raise UsageError(f"MLFLOW_TRACKING_URI={redact(uri)}: is no address ({one_line(error)})") from None
    if is_folder:
        raise UsageError(
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
        raise UsageError(f"the MLflow store {redact(uri)} does not open ({one_line(error)}): {remedy}") from None
    _refuse_deleted(found)
    return client


def _create(path: Path, client: Callable[[str], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():  # another process may have been faster
            aside = path.with_name(f"{path.name}.new")
            aside.unlink(missing_ok=True)
            aside.touch()  # with the rights that new files have here, where SQLite's own is for its owner to write
            client(f"sqlite:///{aside}")
            os.replace(aside, path)


def _opened(client: Callable[[str], Any], uri: str) -> Any:
    """A client of a server or its database; where another process creates the tables now, once they are there.

    A database of its own creates tables in one transaction: whoever comes second is refused when the first is done.
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
    """MLflow, told to print little and to fail soon, unless the user has told it otherwise."""
    quiet = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # it logs a traceback of each failure that is handled here
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the next flush is the retry: do not stop training for minutes
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",  # it would wait as long as a server likes
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # so does it, of each attempt
    try:
        import mlflow
        import mlflow.utils.file_utils
        import mlflow.utils.uri
    except (ImportError, RuntimeError) as error:  # the second where the user has no home
        remedy = "run `make setup`, or use tracking=jsonl"
        raise UsageError(f"tracking=mlflow cannot import MLflow ({one_line(error)}): {remedy}") from None
    return mlflow


def store_uri(mlflow: Any) -> str:
    """MLFLOW_TRACKING_URI, or ``mlflow.db`` in the current folder.

    MLflow writes the folder's path with %20 for a space and the like, which SQLAlchemy takes for the folder's name.
    """
    uri: str = mlflow.get_tracking_uri()
    is_here = uri == mlflow.utils.file_utils.path_to_local_sqlite_uri("mlflow.db")
    return f"sqlite:///{Path('mlflow.db').absolute()}" if is_here else uri


def _sqlite_path(uri: str) -> Path | None:
    if not uri.startswith("sqlite:///") or uri.endswith(":memory:"):
        return None
    return Path(uri.removeprefix("sqlite:///").partition("?")[0])


def existing() -> Any:
    """The client, unless that would create a store in a folder which has none."""
    path = _sqlite_path(store_uri(import_mlflow()))
    if path and not path.exists():
        raise UsageError(f"there is no MLflow store at {path}: change to the project root, or set MLFLOW_TRACKING_URI")
    return prepare()


def answer(request: Callable[[], T]) -> T:
    """What the store answers to a request, for a command that needs the answer to go on.

    Raises:
        UsageError: it refuses, or does not answer in time.
    """
    try:
        return within(STORE_TIMEOUT_S, request)
    except Exception as error:
        raise UsageError(f"the MLflow store does not answer ({one_line(error)}): see MLFLOW_TRACKING_URI") from None


def told(directory: Path, seconds: float, request: Callable[[Any], T]) -> T:
    """What a request gives that tells the store of a run in a directory; it is handed the client.

    Raises:
        UsageError: as the request, or the store does not open, refuses, or does not answer in so many seconds.
    """
    with _telling(directory):
        client = prepare()
        return within(seconds, lambda: request(client))


def told_in_steps(directory: Path, seconds: float, request: Callable[[Any], Iterator[T]]) -> Iterator[T]:
    """The same for a request that goes a step at a time, each of which has so many seconds."""
    with _telling(directory):
        steps = request(prepare())
        while (found := within(seconds, lambda: next(steps, None))) is not None:
            yield found


@contextmanager
def _telling(directory: Path) -> Iterator[None]:
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"MLflow does not take {directory} ({one_line(error)}): try again later") from None


def known_run(client: Any, run_id: str) -> Any:
    """None where the store does not know the id, or where it is none."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id) if run_id else None
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def _experiment_for(client: Any, name: str, parent: Any) -> str:
    """The id of the experiment that a run is to be created in: of that name, else its sweep's, which was renamed."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if not found and parent and parent.info.lifecycle_stage == "active":
        return parent.info.experiment_id
    if not found:
        try:
            return client.create_experiment(name)
        except MlflowException:  # another process was faster, or the store is down
            found = client.get_experiment_by_name(name)
            if not found:
                raise
    _refuse_deleted(found)
    return found.experiment_id


class Delivery:
    """A run in one of the experiments in which it was requested: `push` brings MLflow up to the run's files.

    MLflow's run is found by the id that was written down, wherever its experiment has been renamed to, else by the uuid
    that it is tagged with, as its creator may have been killed before it could write the id down.

    Args:
        record: of a run that has a directory.
        requested: whether the user names the experiment now. Where another one has taken the name since, the run is
            delivered to that, and the record remembers both.
    """

    def __init__(self, client: Any, record: Record, experiment: str, requested: bool = False) -> None:
        self.client, self.record, self.experiment = client, record, experiment
        assert record.directory
        self.directory, self.entry = record.directory, record.copies[experiment]
        self.is_connected = False
        # What was sent, so that no flush sends it again; of rows how many bytes, and their digest.
        self.bytes, self.digest = 0, hashlib.sha256()
        self.tags, self.artifacts = dict[str, str](), set[str]()

        named = client.get_experiment_by_name(experiment)
        there = named.experiment_id if named and named.lifecycle_stage == "active" else None
        self.run = run = self._find_run(there, requested)
        # In MLflow's pages, or with all of the store that had it.
        self.is_deleted = run.info.lifecycle_stage == "deleted" if run else self.is_whole or bool(named and not there)
        self.entry.experiment_id = run.info.experiment_id if run and not self.is_deleted else ""

    def _find_run(self, there: str | None, requested: bool) -> Any:
        """MLflow's run by its id, else by its uuid in the experiment that has the name now; None: there is neither.

        Args:
            there: the id of that experiment; None: none has the name, or it has been deleted.
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
                    self.record.copies = renamed | self.record.copies  # which a save may be reading
                entry.begin("")
            elif not is_deleted or client.get_experiment(run.info.experiment_id).lifecycle_stage != "deleted":
                return run  # of a deleted run in a deleted experiment, to restore the run alone would not show it
        found = client.search_runs([there], f"tags.uuid = '{self.record.uuid}'", max_results=1) if there else []
        if found:
            entry.begin(found[0].info.run_id)
        return next(iter(found), None)

    @property
    def is_whole(self) -> bool:
        return self.entry.has == self.record.state(self.experiment)

    def push(self) -> None:
        """Take all `steps`."""
        for _ in self.steps():
            pass

    def steps(self) -> Iterator[None]:
        """Deliver what has come since, a step at a time, of which none is long.

        Harmless when repeated, also by another process: the store drops what it has.

        Raises:
            UsageError: the experiment has been deleted, or an artifact is no file of the run's folder.
        """
        from mlflow.entities import Metric, Param, RunTag

        client, record, entry = self.client, self.record, self.entry
        artifacts = record.artifact_paths(besides=self.artifacts)
        params = {} if self.is_connected else record.params | log_size(record.params)
        if not self.is_connected:
            self._connect()
        tags = record.tags | entry.tags
        client.log_batch(  # which cuts it into requests of at most 1,000
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
            client.log_batch(entry.run_id, values, synchronous=True)  # whatever MLflow's variables say: it is noted
            self.bytes += len(content)
            self.digest.update(content)
            entry.rows = self.bytes, self.digest.hexdigest()
            yield
        for name, path in artifacts.items():
            client.log_artifact(entry.run_id, str(path), os.path.dirname(name) or None)
            if name == ENCODER:
                self._log_model(path)
            self.artifacts.add(name)
            yield
        if record.status != "RUNNING":
            self.terminate()
        entry.has = record.state(self.experiment)

    def _log_data(self, params: Mapping[str, str]) -> None:
        """Names the data set as an input of the run; MLflow drops what it has."""
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
        except MlflowException:  # another job of a sweep was faster to create the data set, or the store is down
            self.client.log_inputs(self.entry.run_id, [data])

    def _log_model(self, encoder: Path) -> None:
        """Make the encoder a model of the run, with its signature and its figures; a second time completes it."""
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
            if error.error_code != "ENDPOINT_NOT_FOUND":  # a server of MLflow 2 knows no models of runs
                raise
            return
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
        figures, step = list[Metric](), 0
        for row in chain.from_iterable(rows for rows, _ in read_blocks(self.directory / METRICS)):
            step = row["step"]
            of_test = [(key, value) for key, value in row["metrics"].items() if key.startswith("test")]
            figures += [Metric(*each, row["time"], step, model_id, *_data_set(params)) for each in of_test]
        client.log_batch(run_id, figures)
        if model_id not in {each.model_id for each in client.get_run(run_id).outputs.model_outputs}:
            client.log_outputs(run_id, [LoggedModelOutput(model_id, step)])
        client.finalize_logged_model(model_id, "READY")

    def terminate(self) -> None:
        """Tell MLflow how the run ended."""
        self.client.set_terminated(self.entry.run_id, self.record.status, self.record.end_time)

    def _connect(self) -> None:
        """Create the run, or take up what there is of it."""
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
        if there.hexdigest() == digest:  # else they have been changed or cut since, and are sent again
            self.bytes, self.digest = size, there
        if TAG_ERROR in self.run.data.tags and TAG_ERROR not in record.tags:  # of a session before
            client.delete_tag(entry.run_id, TAG_ERROR)
            del self.run.data.tags[TAG_ERROR]
        if record.status == "RUNNING":
            client.update_run(entry.run_id, status="RUNNING")


def _tensor(dtype: str, shape: Sequence[int]) -> str:
    """One side of a signature, as MLflow writes it."""
    return json.dumps([{"type": "tensor", "tensor-spec": {"dtype": dtype, "shape": shape}}])


def _describe_model(run_id: str, takes: Sequence[int], gives: Sequence[int]) -> str:
    """In Markdown."""
    return (
        f"It takes images, uint8 {takes}, normalises them itself, and gives features, float32 {gives}; -1 stands for "
        "any number. In the project's folder, this line gives the features of images: "
        f'`mlflow.pyfunc.load_model("runs:/{run_id}/{MODEL}").predict(images)`'
    )


def _data_set(params: Mapping[str, str]) -> tuple[str, ...]:
    """The name and the digest of the images; nothing where they are not known."""
    name, digest = params.get("data.name"), params.get("data.fingerprint")
    return (name, digest[:36]) if name and digest else ()


def _data_source(params: Mapping[str, str]) -> Any:
    """Where the images come from: a repository of the hub, a folder, or else a package's code."""
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
    """Start MLflow's own thread, which measures the machine and logs to the run; return what ends it."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=store_uri(import_mlflow()))
    monitor.start()
    return monitor.finish


def log_size(params: Mapping[str, str]) -> dict[str, str]:
    """The decimal logarithm of the support-set size as a param, 0 for none stored; nothing where there is no size."""
    size = _number(params, "support_set_size")
    return {} if size is None else {LOG_SIZE: f"{math.log10(max(1, size)):.3f}"}


def _number(params: Mapping[str, str], key: str) -> int | None:
    """None where a record lacks it, or holds something else, as an edited one may."""
    text = params.get(key, "")
    return int(text) if re.fullmatch(r"\d{1,18}", text, re.ASCII) else None


class Delivered(NamedTuple):
    """What has come of a delivery."""

    run_ids: list[str]  # MLflow's, of what was sent
    stays_deleted: bool  # an entry that was deleted in MLflow has been left alone


def deliver(client: Any, record: Record, requested: str = "", again: bool = False) -> Iterator[Delivered]:
    """Deliver what MLflow lacks of a run that has ended, in each experiment in which it was requested.

    This goes a step at a time, and gives what has come of it by then.

    Args:
        client: MLflow's.
        record: of the run.
        requested: the experiment that the user names now.
        again: whether to deliver all of it, also what is deleted in MLflow, which else stays so.
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
