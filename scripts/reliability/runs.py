"""Short runs of the real command on scikit-learn's digits, and comparisons of two finished runs."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from src.evaluation.encoder import read_weights
from src.runs.metrics_file import read_rows
from src.runs.record import ENCODER, METRICS

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
METHODS = {"simclr": ["method=simclr"], "nnclr": ["method=nnclr", "queue_size=100"], "kmclr": ["method=kmclr", "k=7"]}
SMALL = [
    *("experiment=demo", "batch_size=64", "data.limit=200", "precision=float32", "evaluation.every=1"),
    *("projector.hidden=[32]", "projector.out=16", "evaluation.epochs=5", "tracking.log_every=1"),
    *("checkpoint.every=1", "schedule.warmup_epochs=0"),
]

T = TypeVar("T")
U = TypeVar("U")


class Process(Protocol):
    """A running command, with the methods that the campaigns use."""

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def kill(self) -> None: ...


def environment(**more: str) -> dict[str, str]:
    """The environment of a command: one thread, MLflow's default store in its folder, and the variables in ``more``."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "HYDRA_"))}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return clean | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"} | more


def start(folder: Path, overrides: Sequence[str], module: str = "src.train", **more: str) -> subprocess.Popen[bytes]:
    """Start the real command in a folder with one thread, and append its output to ``FOLDER/output.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(
            [PYTHON, "-m", module, *overrides],
            cwd=folder,
            env=environment(**more),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def output(folder: Path) -> str:
    return (folder / "output.txt").read_text(errors="replace")


def wait_for(condition: Callable[[], object], process: Process, seconds: float = 300) -> bool:
    """Wait until the condition holds, checking every millisecond; return False if the process ends before that."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            return False
        if time.monotonic() > deadline:
            process.kill()
            raise TimeoutError(f"waited {seconds:.0f} s for {process!r}")
        time.sleep(0.001)
    return True


def logged(run: Path) -> int:
    """The number of rows in a run's ``metrics.jsonl``."""
    metrics = run / METRICS
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def rows(run: Path) -> list[tuple[str, int, float]]:
    """All values in ``metrics.jsonl`` except times and memory, which differ from run to run."""
    return [
        (key, row["step"], value)
        for row in read_rows(run / METRICS)[0]
        for key, value in row["metrics"].items()
        if not key.startswith(("time/", "memory/"))
    ]


def stored(folder: Path) -> dict[str, list[tuple[str, int, float]]]:
    """All values in ``FOLDER/mlflow.db`` except times and memory, by the run's output directory."""
    with sqlite3.connect(f"file:{folder / 'mlflow.db'}?mode=ro", uri=True) as store:
        found: dict[str, list[tuple[str, int, float]]] = {}
        query = "SELECT t.value, m.key, m.step, m.value FROM metrics m JOIN tags t ON t.run_uuid = m.run_uuid"
        for directory, key, step, value in store.execute(f"{query} WHERE t.key = 'output_dir'"):
            if not key.startswith(("time/", "memory/")):
                found.setdefault(directory, []).append((key, step, value))
    return found


def statuses(folder: Path) -> Counter[str]:
    """Count the runs in ``FOLDER/mlflow.db`` by status."""
    with sqlite3.connect(f"file:{folder / 'mlflow.db'}?mode=ro", uri=True) as store:
        return Counter(status for (status,) in store.execute("SELECT status FROM runs"))


def lost_and_doubled(expected: Iterable[T], found: Iterable[T]) -> tuple[int, int]:
    """Count the expected values that are missing, and the values found that are duplicates or not expected."""
    want, have = Counter(expected), Counter(found)
    return (want - have).total(), (have - want).total()


def compared(broken: Path, unbroken: Path, run: str) -> list[str]:
    """List where a run differs from the same run in another folder: in bits, or rows in metrics.jsonl or MLflow.

    Args:
        broken: the folder of the interrupted command; its MLflow store is compared too.
        unbroken: the folder of the uninterrupted command.
        run: the run's folder, relative to both.
    """
    wrong = [f"{run}: other bits: {each}" for each in differences(broken / run, unbroken / run)]
    histories = stored(broken)
    for place, found in (("metrics.jsonl", rows(broken / run)), ("MLflow", histories.get(str(broken / run), []))):
        lost, doubled = lost_and_doubled(rows(unbroken / run), found)
        if lost or doubled:
            wrong.append(f"{run}, {place}: {lost} rows lost, {doubled} doubled or different")
    return wrong


def differences(one: Path, other: Path) -> list[str]:
    """List where two finished runs differ, bit for bit, in weights, support set, optimizers or encoder file."""
    states = [_final_state(run) for run in (one, other)]
    found = [key for key in sorted(states[0].keys() | states[1].keys()) if not _same(states[0], states[1], key)]
    (said, weights), (other_said, other_weights) = (read_weights(run / ENCODER) for run in (one, other))
    if said != other_said or weights.keys() != other_weights.keys():  # not bytes: safetensors orders metadata freely
        return [*found, ENCODER]
    return found + [f"{ENCODER}/{key}" for key in weights if not torch.equal(weights[key], other_weights[key])]


def _final_state(run: Path) -> dict[str, Any]:
    newest = max((run / "checkpoints").glob("step-*.pt"))
    state = torch.load(newest, weights_only=True)
    flat: dict[str, Any] = {}

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, dict | list):
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                visit(f"{prefix}/{key}", inner)
        else:
            flat[prefix] = value

    for part in ("model", "classifier", "optimizer", "classifier_optimizer", "step"):
        visit(part, state[part])
    return flat


def _same(one: dict[str, Any], other: dict[str, Any], key: str) -> bool:
    if key not in one or key not in other:
        return False
    a, b = one[key], other[key]
    return bool(torch.equal(a, b)) if isinstance(a, torch.Tensor) else a == b


def two_at_a_time(function: Callable[[U], T], items: Iterable[U]) -> list[T]:
    """Map a function over items in two threads, each of which waits for the processes that it starts."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, items))
