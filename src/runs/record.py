"""``run.json``: what a run is and how it stands, and the names of the run's files and tags.

The files are the truth; MLflow is a place that they are delivered to (src/runs/tracker.py).
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
from typing_extensions import TypedDict  # typing's own is refused by pydantic before Python 3.12

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
ENCODER = "encoder.safetensors"  # the weights of a finished run's encoder, and what they are
CURVES = "curves.png"
CHECKPOINTS = "checkpoints"  # the folder of `CHECKPOINT_FILES`
CHECKPOINT_FILES = re.compile(r"step-(\d+)\.pt")
DIGEST_BYTES = 32  # a checkpoint ends with the SHA-256 of what comes before

# The tags of a run.
TAG_OUTPUT_DIR = "output_dir"  # the run's folder
TAG_CONFIG_HASH = "config_hash"
TAG_DTYPE = "dtype"  # that the forward pass computes in
TAG_INIT_TAKEN = "init.taken"  # the parts whose first weights come from ``init``
TAG_ERROR = "error"  # why the run did not finish
TAG_PRUNED = "pruned"  # a search stopped it early
TAG_DIVERGED = "diverged"  # the run is not worth continuing
TAG_COLLAPSED = "collapsed"  # at which step, and how
TAG_SUPPORT_UNUSED = "support_unused"  # the support set was never filled, so the positives were the other views
TAG_CODE = "code/"  # TAG_CODE and a module's name: the digest of one's own code
CODE = "code"  # among the conditions: the digest of this project's modules; older records have none
TAG_CONDITIONS_CHANGED = "conditions_changed"  # that bits depend on, and from which step on
TAG_EVALUATION_CHANGED = "evaluation_changed"  # settings of the evaluation, and at which step
# By which settings, where they are not the run's: TAG_EVALUATED/test_linear or the like, and the whole name of a metric
# of which that is not true.
TAG_EVALUATED = "evaluated"
TAG_SWEEP_ID = "sweep_id"  # of a sweep's own run
TAG_CHARTS = "charts"  # of a sweep's own run: where MLflow's pages show it, after their address
# Tags that MLflow's pages give a meaning.
TAG_PARENT = "mlflow.parentRunId"  # MLflow's id of the sweep's run, under which its pages show a job
TAG_NOTE = "mlflow.note.content"  # a description, in Markdown
TAG_COLOUR = "mlflow.runColor"  # the run's colour in every chart, such as "#0072b2"
TAGS_OF_FREE_TEXT = ("command", TAG_ERROR, TAG_EVALUATION_CHANGED)  # which may quote anything

# What to do where there is no record, and where it is damaged.
NAME_ANOTHER, MOVE_AWAY = "name another folder", "move it away, or name another folder"

logger = logging.getLogger(__name__)


def _within(name: str) -> str:
    if PurePath(name).is_absolute() or ".." in PurePath(name).parts or "\0" in name:
        raise ValueError(f"{name!r} is not inside the run's folder")
    return name


@dataclass
class ExperimentEntry:
    """The run's entry in one MLflow experiment. A run has one for each ``tracking.experiment`` it was started with."""

    run_id: str = ""  # MLflow's; empty until MLflow has the run there
    has: str = ""  # the `Record.state` of which MLflow has everything
    tags: dict[str, str] = field(default_factory=dict)  # those of its sweeps there; MLflow has the run's as well
    for_mlflow: bool = False  # whether that was ever with tracking=mlflow
    experiment_id: str = ""  # MLflow's of where its pages show the run; empty where they do not
    rows: tuple[Natural, str] | None = None  # that MLflow has: how many bytes, and their SHA-256; None: not known

    def begin(self, run_id: str) -> None:
        """Forget what MLflow has of the run, because it has another one now, or none."""
        self.run_id, self.has, self.rows = run_id, "", None


@dataclass
class Record:
    """What ``run.json`` must hold. Times are in milliseconds since the epoch, as in MLflow.

    A report's runs are records too: those that are read from MLflow hold what it has of them.
    """

    uuid: str
    name: str
    experiment: str  # the last that was requested
    start_time: Natural
    end_time: Natural | None = None
    seconds: NotNegative = 0.0  # worked on it, in all its sessions
    status: Annotated[str, one_of("RUNNING", "FINISHED", "FAILED", "KILLED")] = "RUNNING"
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)  # the last value of each
    artifacts: list[Annotated[str, AfterValidator(_within)]] = field(default_factory=list)  # relative to the directory
    conditions: list[dict[str, str]] = field(default_factory=list)  # that bits depend on, each from a step on
    rows: tuple[Natural, str] | None = None  # how many bytes of them there were, and their SHA-256; None: an old record
    copies: dict[str, ExperimentEntry] = field(default_factory=dict)  # by the requested experiment
    directory: Path | None = None  # where it was read or written, which is not in the file; None: not known

    @classmethod
    def new(cls, name: str, experiment: str) -> Record:
        return cls(uuid.uuid4().hex, name, experiment, now_ms(), copies={experiment: ExperimentEntry()})

    @classmethod
    def load(cls, directory: Path, hash_rows: bool = True) -> Record:
        """Read a directory's record.

        Args:
            directory: the run's.
            hash_rows: whether to see that the rows are as the run left them, or only that there are no fewer.

        Raises:
            UsageError: there is none, or it is damaged.
        """
        path = directory / RECORD
        try:
            content = read_regular(path)
            record = _RECORD.validate_json(content)
            record.directory = directory.resolve()
            if not record.copies:
                record._take_over(_OLD.validate_json(content))
            if record.experiment not in record.copies:
                raise ValueError(f"copies: lacks the experiment {record.experiment!r}")
            record._compare(content, hash_rows)
        except (OSError, ValueError) as error:
            remedy = NAME_ANOTHER if isinstance(error, FileNotFoundError) else MOVE_AWAY
            raise UsageError(f"{path} is not the record of a run ({reason(error)}): {remedy}") from None
        return record

    def _compare(self, content: bytes, hash_rows: bool) -> None:
        """Say so where the record or its rows are not as a run left them; they may have been edited on purpose."""
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

    def _take_over(self, old: Old) -> None:
        """Convert what an old ``run.json`` says of MLflow, in which a run had a single experiment."""
        sweeps = {key: self.tags.pop(key) for key in list(self.tags) if key == TAG_PARENT or key.startswith("sweep.")}
        run_id = old["run_id"] if old["run_id"] != self.uuid else ""
        self.copies = {self.experiment: ExperimentEntry(run_id, "", sweeps, old["for_mlflow"])}
        told = (old["delivered_status"], old["delivered_bytes"], old["delivered_artifacts"])
        if told == (self.status, self._rows_bytes(), len(self.artifacts)):
            self.entry.has = self.state(self.experiment)

    @classmethod
    def find(cls, directory: Path, hash_rows: bool = True) -> Record | None:
        """As `load`; None before a run has begun there."""
        return cls.load(directory, hash_rows) if os.path.lexists(directory / RECORD) else None

    @property
    def entry(self) -> ExperimentEntry:
        """In the experiment that was last requested."""
        return self.copies[self.experiment]

    @property
    def run_id(self) -> str:
        """MLflow's, in the experiment that was last requested; `uuid` where MLflow does not have the run."""
        return self.entry.run_id or self.uuid

    def request(self, tracking: Tracking) -> ExperimentEntry:
        """Note that the run is requested in an experiment."""
        self.experiment = tracking.experiment
        entry = self.copies.setdefault(tracking.experiment, ExperimentEntry())
        entry.for_mlflow |= tracking.name == "mlflow"
        return entry

    def artifact_paths(self, besides: Container[str] = ()) -> dict[str, Path]:
        """The artifacts that are there, besides some; a folder may have been tidied.

        Raises:
            UsageError: one is no file of the run's own folder.
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

    def changes(self, now: Mapping[str, str]) -> str:
        """In which conditions the run was worked on last and is not now; empty where they are the same."""
        if not self.conditions:
            return ""
        before = {**now, CODE: "another", **self.conditions[-1]}
        return ", ".join(f"{key} was {before[key]} and is {now[key]}" for key in now if before[key] != now[key])

    def continue_under(self, now: Mapping[str, str], step: int) -> None:
        """Add conditions to the history, unless the run was worked on under the same."""
        changes = self.changes(now)
        if changes:
            self.tags[TAG_CONDITIONS_CHANGED] = "; ".join(
                filter(None, [self.tags.get(TAG_CONDITIONS_CHANGED), f"{changes} from step {step} on"])
            )
        if changes or not self.conditions:
            self.conditions.append({"step": str(step), **now})

    def state(self, experiment: str) -> str:
        """Twelve hex digits of all that MLflow is told of the run in an experiment."""
        tags = self.tags | self.copies[experiment].tags
        told = [self.status, self.end_time, self.params, tags, self.artifacts, self._rows_bytes()]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]

    def _rows_bytes(self) -> int:
        path = (self.directory or Path()) / METRICS
        return path.stat().st_size if path.exists() else 0

    def save(self, directory: Path) -> None:
        """Write ``run.json``, unless that is what it says; params and tags lose what is secret in them."""
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


class Old(TypedDict):
    """What else a file holds that is from the time when a run was in one experiment."""

    run_id: str
    for_mlflow: bool
    delivered_status: str
    delivered_bytes: int
    delivered_artifacts: int


_RECORD, _OLD = TypeAdapter(Record), TypeAdapter(Old)


def _digest(values: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@cache  # a run reads its record several times
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def records_below(root: Path) -> Iterator[tuple[Path, Record]]:
    """Every run's directory below a folder, and its record. A damaged one is passed over, with a warning.

    Links to folders are followed; a folder that is reached in several ways counts once, so a link may also lead back.
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
            logger.warning("passed over: %s", str(error).removesuffix(f": {MOVE_AWAY}"))


def checkpoints_by_step(folder: Path) -> dict[int, Path]:
    """The checkpoints that a folder holds, whole or damaged, the earliest first."""
    found = {path: CHECKPOINT_FILES.fullmatch(path.name) for path in folder.glob("step-*.pt")}
    return dict(sorted((int(match[1]), path) for path, match in found.items() if match))


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the latest step, whole or damaged; None without one."""
    return next(reversed(checkpoints_by_step(folder).values()), None)


def now_ms() -> int:
    return time.time_ns() // 1_000_000
