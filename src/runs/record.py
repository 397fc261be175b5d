"""The files of one run: ``run.json``, what it is and how it stands, and ``metrics.jsonl``, a row a logged step.

They are the truth; MLflow is a place that they are delivered to (src/runs/tracker.py).
"""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from src.errors import UsageError
from src.system.atomic_write import write_whole
from src.system.redact import one_line, redact

METRICS = "metrics.jsonl"
RECORD = "run.json"


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
    delivered_status: str = ""  # what MLflow was told with the last of it
    for_mlflow: bool = True  # False with tracking=jsonl

    @classmethod
    def new(cls, name: str, experiment: str) -> Record:
        identity = uuid.uuid4().hex
        return cls(identity, identity, name, experiment, now())

    @classmethod
    def load(cls, directory: Path) -> Record:
        path = directory / RECORD
        try:
            record = cls(**json.loads(path.read_text()))
            record.metrics = {key: float(value) for key, value in record.metrics.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is not the record of a run ({one_line(error)}): name another folder") from None
        return record

    @classmethod
    def find(cls, directory: Path) -> Record | None:
        """The directory's record; None before a run has begun there."""
        return cls.load(directory) if (directory / RECORD).exists() else None

    def close(self, status: str, error: str = "") -> None:
        """Notes how the run ended, and why if it did not finish."""
        self.status, self.end_time = status, now()
        if error:
            self.tags["error"] = error

    def is_delivered(self, directory: Path) -> bool:
        """Whether MLflow has all of it, or is not meant to."""
        rows = (directory / METRICS).stat().st_size if (directory / METRICS).exists() else 0
        told = (self.delivered_status, self.delivered_bytes, self.delivered_artifacts)
        return not self.for_mlflow or told == (self.status, rows, len(self.artifacts))

    def save(self, directory: Path) -> None:
        """Writes ``run.json``; params and tags lose what is secret in them."""
        self.params, self.tags = (
            {key: redact(value) for key, value in each.items()} for each in (self.params, self.tags)
        )
        values = asdict(self) | {"metrics": encode(self.metrics)}
        write_whole(directory / RECORD, json.dumps(values, indent=1, allow_nan=False).encode())


def records_below(root: Path) -> Iterator[tuple[Path, Record]]:
    """Every run's directory below a folder, and its record."""
    return ((path.parent, Record.load(path.parent)) for path in root.rglob(RECORD))


def cut_and_read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Removes a last row that a kill cut short; the rows, and the length of the file."""
    path.touch()
    rows, end = read_rows(path)
    os.truncate(path, end)
    return rows, end


def read_rows(path: Path, start: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The complete rows from byte ``start``, and the byte after the last of them."""
    with path.open("rb") as file:
        file.seek(start)
        data = file.read()
    complete = data[: data.rfind(b"\n") + 1]
    try:
        return [json.loads(line) for line in complete.splitlines()], start + len(complete)
    except ValueError as error:
        raise UsageError(f"{path} holds a damaged row ({error}): remove that row") from None


def encode(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """JSON has no NaN and no infinity: they are written as text, which ``float`` reads back."""
    return {key: value if math.isfinite(value) else str(value) for key, value in metrics.items()}


def now() -> int:
    return time.time_ns() // 1_000_000
