"""What the tests of logging share: ways to read and to break an MLflow store, and a run in another process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from src.config.schema import Tracking
from src.runs import record
from src.runs.tracker import Tracker
from tests.conftest import PROJECT

LOGGERS = {"src.runs.tracker", "src.runs.delivery", "src.reporting.mlflow_charts"}
JSONL = Tracking("jsonl", "exp", 10)
MLFLOW = Tracking("mlflow", "exp", 10)


def rows(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / record.METRICS).read_text().splitlines()]


def history(client, run_id: str, key: str) -> list[tuple[int, float]]:
    """(step, value) of every point that the store has of a metric, repeats included."""
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, key))


def warnings(caplog) -> list[str]:
    """The messages of this project's logging code, each of which must be one line."""
    messages = [each.getMessage() for each in caplog.records if each.name in LOGGERS]
    assert not any("\n" in message for message in messages)
    return messages


def break_store(client, monkeypatch, *methods: str) -> None:
    """Let these methods of the client fail, as if the store were down."""

    def fail(*args, **kwargs):
        raise ConnectionError("the store is down\nand this is its traceback")

    for method in methods:
        monkeypatch.setattr(type(client), method, fail)


def train(tracker: Tracker, steps: range) -> None:
    """Log a deterministic run: the loss at every 3rd step, kNN accuracy at every 6th."""
    for step in steps:
        if step % 3 == 0:
            tracker.log({"train/loss": 1 / (1 + step)} | ({"val/knn": step / 100} if step % 6 == 0 else {}), step)


def start(code: str, directory: Path, **environment: str) -> subprocess.Popen:
    """Start an interpreter that runs the code, without this process's MLflow variables."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    env |= {"PYTHONPATH": str(PROJECT), **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], cwd=directory, env=env, **pipes)


def impatient(patch: pytest.MonkeyPatch) -> None:
    """Let SQLite wait 0.2 seconds for a lock instead of the 20 seconds that MLflow sets."""
    from mlflow.store.db import utils

    text = utils.sql.text
    patch.setattr(utils.sql, "text", lambda line: text(line.replace("busy_timeout = 20000", "busy_timeout = 200")))


RUN = """
import os
from pathlib import Path
from src.config.schema import Tracking
from src.runs import mlflow_store
from src.runs.tracker import Tracker
mlflow_store.STORE_TIMEOUT_S = 600.0  # with a busy machine
name = os.environ["NAME"]
tracker = Tracker(Path(name), Tracking("mlflow", "exp", 10), {"k": 50}, {})
for step in range(50):
    tracker.log({"train/loss": 1 / (1 + step), "val/knn": step}, step)
    tracker.flush()
tracker.close("FINISHED")
"""
