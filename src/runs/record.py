"""A run's record in ``run.json``: its settings, tags, state and results; and the names of a run's files and tags.

The files hold the truth about a run, and are delivered to MLflow (src/runs/tracker.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path, PurePath
from typing import Annotated

from pydantic import AfterValidator, TypeAdapter
from typing_extensions import TypedDict  # pydantic refuses typing's own before Python 3.12

from src.config.schema import Natural, NotNegative, Tracking, one_of
from src.errors import UsageError
from src.runs.metrics_file import begins_with, encode, reason
from src.system.atomic_write import write_whole
from src.system.redact import hide_in_settings, redact
from src.system.regular_file import read_regular

# The files in a run's folder.
METRICS = "metrics.jsonl"
RECORD = "run.json"
CONFIG = "config.yaml"  # the settings that differ from their neutral defaults
ENCODER = "encoder.safetensors"  # the weights of a finished run's encoder, and a description of them
CURVES = "curves.png"
CHECKPOINTS = "checkpoints"  # the folder of `CHECKPOINT_FILES`
CHECKPOINT_FILES = re.compile(r"step-(\d+)\.pt")
DIGEST_BYTES = 32  # a checkpoint ends with the SHA-256 of all bytes before it

# The tags of a run.
TAG_OUTPUT_DIR = "output_dir"  # the run's folder
TAG_CONFIG_HASH = "config_hash"
TAG_DTYPE = "dtype"  # the dtype of the forward pass
TAG_INIT_TAKEN = "init.taken"  # the parts whose first weights come from ``init``
TAG_ERROR = "error"  # why the run did not finish
TAG_PRUNED = "pruned"  # a search stopped the run early
TAG_DIVERGED = "diverged"  # the run is not worth continuing
TAG_COLLAPSED = "collapsed"  # at which step the run collapsed, and how
TAG_SUPPORT_UNUSED = "support_unused"  # the support set was never filled, so the positives were the other views
TAG_CODE = "code/"  # with the name of a module of the user's appended: the digest of its code
CODE = "code"  # a key of the conditions: the digest of this project's modules; older records lack it
TAG_CONDITIONS_CHANGED = "conditions_changed"  # which of the conditions that bits depend on changed, at which step
TAG_EVALUATION_CHANGED = "evaluation_changed"  # which settings of the evaluation changed, and at which step
# The settings by which metrics were evaluated, unless they have always been the run's own. "evaluated/test_linear", for
# instance, is the tag of a family of metrics; a tag with a metric's whole name replaces it for that metric.
TAG_EVALUATED = "evaluated"
TAG_SWEEP_ID = "sweep_id"  # only a sweep's own run has it
TAG_CHARTS = "charts"  # only of a sweep's own run: the path of its charts in MLflow, without the server's address
# Tags that have a meaning in MLflow's pages.
TAG_PARENT = "mlflow.parentRunId"  # MLflow's id of the sweep's run, under which MLflow nests a job
TAG_NOTE = "mlflow.note.content"  # a description, in Markdown
TAG_COLOUR = "mlflow.runColor"  # the run's colour in every chart, such as "#0072b2"
TAGS_OF_SESSION_END = (TAG_ERROR, TAG_PRUNED)  # a later session removes them
TAGS_OF_FREE_TEXT = ("command", TAG_ERROR, TAG_EVALUATION_CHANGED)  # these may quote anything, also a secret

# The remedies in messages about a record that is absent or damaged.
NAME_ANOTHER, MOVE_AWAY = "name another folder", "move it away, or name another folder"

logger = logging.getLogger(__name__)


def _within(name: str) -> str:
    if PurePath(name).is_absolute() or ".." in PurePath(name).parts or "\0" in name:
        raise ValueError(f"{name!r} is not inside the run's folder")
    return name


@dataclass
class ExperimentEntry:
    """A run's state in one MLflow experiment. A run has an entry for each ``tracking.experiment`` of its sessions."""

    run_id: str = ""  # MLflow's id of the run; empty until the experiment has the run
    has: str = ""  # the `Record.state` that MLflow has completely
    tags: dict[str, str] = field(default_factory=dict)  # of the run's sweeps there; MLflow also has the record's tags
    for_mlflow: bool = False  # whether the experiment was ever requested with tracking=mlflow
    experiment_id: str = ""  # MLflow's id of the experiment; empty if MLflow's pages do not show the run
    rows: tuple[Natural, str] | None = None  # the rows that MLflow has: bytes and SHA-256; None: not known

    def begin(self, run_id: str) -> None:
        """Take over the id of another run in MLflow, or none, and forget what the former run had."""
        self.run_id, self.has, self.rows = run_id, "", None


@dataclass
class Record:
    """The content of ``run.json``. Times are in milliseconds since the epoch, as in MLflow.

    The runs of a report are records too; a record that is read from MLflow holds what MLflow has of the run.
    """

    uuid: str
    name: str
    experiment: str  # the one that was requested last
    start_time: Natural
    end_time: Natural | None = None
    seconds: NotNegative = 0.0  # of work on the run, in all sessions together
    status: Annotated[str, one_of("RUNNING", "FINISHED", "FAILED", "KILLED")] = "RUNNING"
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)  # the last value of each
    artifacts: list[Annotated[str, AfterValidator(_within)]] = field(default_factory=list)  # relative to the directory
    conditions: list[dict[str, str]] = field(default_factory=list)  # what bits depend on, and from which step on
    rows: tuple[Natural, str] | None = None  # bytes of the rows when this was saved, and SHA-256; None: an old record
    copies: dict[str, ExperimentEntry] = field(default_factory=dict)  # by the name of the requested experiment
    directory: Path | None = None  # where the record was read or written; not in the file; None: not known

    @classmethod
    def new(cls, name: str, experiment: str) -> Record:
        """Make the record of a run that begins now."""
        return cls(uuid.uuid4().hex, name, experiment, now_ms(), copies={experiment: ExperimentEntry()})

    @classmethod
    def load(cls, directory: Path, hash_rows: bool = True) -> Record:
        """Read the record in a directory, and warn if the record or the rows are not as a run left them.

        Args:
            directory: the run's.
            hash_rows: whether to compare the content of the rows, or only to check that no bytes are missing.

        Raises:
            UsageError: there is no record, or it is damaged.
        """
        path = directory / RECORD
        try:
            content = read_regular(path)
            record = _RECORD.validate_json(content)
            record.directory = directory.resolve()
            if not record.copies:
                record._convert_old(_OLD.validate_json(content))
            if record.experiment not in record.copies:
                raise ValueError(f"copies: lacks the experiment {record.experiment!r}")
            record._compare(content, hash_rows)
        except (OSError, ValueError) as error:
            remedy = NAME_ANOTHER if isinstance(error, FileNotFoundError) else MOVE_AWAY
            raise UsageError(f"{path} is not the record of a run ({reason(error)}): {remedy}") from None
        return record

    def _compare(self, content: bytes, hash_rows: bool) -> None:
        """Warn if the record or its rows are not as a run left them; a user may have edited them on purpose."""
        assert self.directory
        values = json.loads(content)
        if values.pop("sha256", None) not in (None, _digest(values)):
            _warn_once(f"{self.directory / RECORD} has been changed since a run wrote it: its figures may be others")
        rows = self.directory / METRICS
        if not (self.rows and rows.exists()):
            return
        if self._rows_bytes() + 1 < self.rows[0] or (hash_rows and not begins_with(rows, *self.rows)):
            _warn_once(
                f"{rows} has been changed since a run wrote it: values may be missing, others, or twice in MLflow"
            )

    def _convert_old(self, old: OldRecord) -> None:
        """Make an entry from an old ``run.json``, in which a run had a single experiment."""
        sweeps = {key: self.tags.pop(key) for key in list(self.tags) if key == TAG_PARENT or key.startswith("sweep.")}
        run_id = old["run_id"] if old["run_id"] != self.uuid else ""
        self.copies = {self.experiment: ExperimentEntry(run_id, "", sweeps, old["for_mlflow"])}
        told = (old["delivered_status"], old["delivered_bytes"], old["delivered_artifacts"])
        if told == (self.status, self._rows_bytes(), len(self.artifacts)):
            self.entry.has = self.state(self.experiment)

    @classmethod
    def find(cls, directory: Path, hash_rows: bool = True) -> Record | None:
        """Read the record as `load` does; None if there is none, because no run has begun there."""
        return cls.load(directory, hash_rows) if os.path.lexists(directory / RECORD) else None

    @property
    def entry(self) -> ExperimentEntry:
        """The entry for the experiment that was requested last."""
        return self.copies[self.experiment]

    @property
    def run_id(self) -> str:
        """MLflow's id of the run in the experiment that was requested last; `uuid` if MLflow does not have the run."""
        return self.entry.run_id or self.uuid

    def request(self, tracking: Tracking) -> ExperimentEntry:
        """Note that the run is requested in an experiment; return its entry there."""
        self.experiment = tracking.experiment
        entry = self.copies.setdefault(tracking.experiment, ExperimentEntry())
        entry.for_mlflow |= tracking.name == "mlflow"
        return entry

    def artifact_paths(self, besides: Container[str] = ()) -> dict[str, Path]:
        """The paths of the artifacts by name, without those in ``besides`` and those that a user has removed.

        Raises:
            UsageError: an artifact is not a file inside the run's own folder.
        """
        assert self.directory
        wanted = {name: self.directory / name for name in self.artifacts if name not in besides}
        paths = {name: path for name, path in wanted.items() if os.path.lexists(path)}
        for name, path in paths.items():
            if not (path.resolve().is_relative_to(self.directory.resolve()) and path.is_file()):
                raise UsageError(f"{path} is not a file of the run's own folder: remove {name!r} from {RECORD}")
        return paths

    def close(self, status: str, error: str = "") -> None:
        """Note how the run ended, and why if it did not finish."""
        self.status, self.end_time = status, now_ms()
        if error:
            self.tags[TAG_ERROR] = error

    @property
    def outcome(self) -> str:
        """How the run ended, in a word: its status in small letters, or ``diverged``, ``pruned`` or ``collapsed``."""
        if self.status == "FINISHED":
            return "finished"
        ends = (TAG_DIVERGED, TAG_PRUNED, *([TAG_COLLAPSED] if self.status == "FAILED" else []))
        return next((tag for tag in ends if tag in self.tags), self.status.lower())

    def unfinished(self, remedy: str) -> str:
        """Say that the run has not finished, and what to do: ``remedy``, which would not help one that has diverged."""
        error = self.tags.get(TAG_ERROR) if self.outcome == TAG_DIVERGED else None
        return f"the run is {self.status}, not FINISHED{f': {error}' if error else f'; {remedy}'}"

    def changes(self, now: Mapping[str, str]) -> str:
        """Say which of the present conditions differ from those of the last session; empty if none does."""
        if not self.conditions:
            return ""
        before = {**now, CODE: "another", **self.conditions[-1]}
        return ", ".join(f"{key} was {before[key]} and is {now[key]}" for key in now if before[key] != now[key])

    def continue_under(self, now: Mapping[str, str], step: int) -> None:
        """Add the present conditions to the history, unless they are those of the last session."""
        changes = self.changes(now)
        if changes:
            self.tags[TAG_CONDITIONS_CHANGED] = "; ".join(
                filter(None, [self.tags.get(TAG_CONDITIONS_CHANGED), f"{changes} from step {step} on"])
            )
        if changes or not self.conditions:
            self.conditions.append({"step": str(step), **now})

    def state(self, experiment: str) -> str:
        """A digest, twelve hex digits, of everything that is delivered to MLflow of the run in an experiment."""
        tags = self.tags | self.copies[experiment].tags
        told = [self.status, self.end_time, self.params, tags, self.artifacts, self._rows_bytes()]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]

    def _rows_bytes(self) -> int:
        path = (self.directory or Path()) / METRICS
        return path.stat().st_size if path.exists() else 0

    def save(self, directory: Path) -> None:
        """Write ``run.json`` if its content changes; secrets are removed from the params and the tags."""
        self.directory = directory.resolve()
        self.params, self.tags = hide_in_settings(self.params), hide_in_settings(self.tags)
        self.tags |= {key: redact(self.tags[key]) for key in TAGS_OF_FREE_TEXT if key in self.tags}
        values = asdict(self) | {"metrics": encode(self.metrics)}
        del values["directory"]
        values = json.loads(json.dumps(values, allow_nan=False))
        values["sha256"] = _digest(values)
        content = json.dumps(values, indent=1, allow_nan=False).encode()
        if not (directory / RECORD).exists() or (directory / RECORD).read_bytes() != content:
            write_whole(directory / RECORD, content)


class OldRecord(TypedDict):
    """The further keys of a ``run.json`` from the time when a run had a single experiment."""

    run_id: str
    for_mlflow: bool
    delivered_status: str
    delivered_bytes: int
    delivered_artifacts: int


_RECORD, _OLD = TypeAdapter(Record), TypeAdapter(OldRecord)


def _digest(values: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@cache  # because a run reads its record several times
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def records_below(root: Path) -> Iterator[tuple[Path, Record]]:
    """Find the directory and the record of every run below a folder; skip damaged records with a warning.

    Links to folders are followed. A folder that is reached in several ways counts once, so links may form a circle.
    """
    seen = set[str]()
    for parent, folders, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        if RECORD not in files + folders:
            continue
        try:
            yield Path(parent), Record.load(Path(parent), hash_rows=False)
        except UsageError as error:
            logger.warning("skipped: %s", str(error).removesuffix(f": {MOVE_AWAY}"))


def checkpoints_by_step(folder: Path) -> dict[int, Path]:
    """The checkpoints in a folder, undamaged or damaged, by their steps, the earliest first."""
    found = {path: CHECKPOINT_FILES.fullmatch(path.name) for path in folder.glob("step-*.pt")}
    return dict(sorted((int(match[1]), path) for path, match in found.items() if match))


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the latest step, undamaged or damaged; None if there is none."""
    return next(reversed(checkpoints_by_step(folder).values()), None)


def now_ms() -> int:
    return time.time_ns() // 1_000_000
