"""Fixtures that several tests share."""

import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from src.runs import mlflow_store, tracker

# A busy machine fails no test, and neither does chance: every run draws the same examples, but for more CASES.
settings.register_profile("same", deadline=None, derandomize="CASES" not in os.environ)
settings.load_profile("same")

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup every process of a test would ignore it

PROJECT = Path(__file__).parent.parent
ELSEWHERE = {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}  # of this project's commands in another folder
CIFAR100 = Path(os.environ.get("CIFAR100_ROOT", PROJECT.parent / "shared" / "data" / "cifar100"))


def pytest_configure():
    """Forget a team's server and a shell of torchrun's: no test may write to the one, or be a rank of the other."""
    for name in ("MLFLOW_TRACKING_URI", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ.pop("HYDRA_FULL_ERROR", None)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # a long one begun last keeps one core alone
    for item in items:
        if item.get_closest_marker("cifar") and not CIFAR100.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"no CIFAR-100 at {CIFAR100}; set CIFAR100_ROOT"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """Decoded images, shared by all tests of a session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def python():
    """An interpreter for ``python -m MODULE``, whose imports have been done (`tests.warm`)."""
    with tempfile.TemporaryDirectory() as folder:
        executable, address = Path(folder) / "python", Path(folder) / "socket"
        executable.write_text(
            f'#!/bin/sh\nexec "{sys.executable}" -IS "{PROJECT}/tests/forked.py" "{sys.executable}" "{address}" "$@"\n'
        )
        executable.chmod(0o755)
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.warm", address, executable],
            cwd=PROJECT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
        )
        while not address.exists() and server.poll() is None:
            time.sleep(0.1)
        yield str(executable)
        server.communicate()


@pytest.fixture
def command(python, cache_dir, tmp_path):
    """Run ``python -m MODULE ARGUMENTS`` as a user would, in the test's own folder; returns the finished process.

    Imports are done ``anew`` where they read the variables that the test sets.
    """

    def run(module, *arguments, environment=None, anew=False):
        fixed = ELSEWHERE | {"COLUMNS": "200"}
        return subprocess.run(
            [sys.executable if anew else python, "-m", module, *arguments],
            cwd=tmp_path,
            env=os.environ | fixed | (environment or {}),
            capture_output=True,
            text=True,
            timeout=600,
        )

    return run


@pytest.fixture(scope="session")
def small(cache_dir):
    """Overrides that make a run take a second or two: digits at their own 8x8 pixels, the tiny ResNet, narrow heads."""
    return [
        "experiment=demo",
        "data.image_size=8",
        "epochs=2",
        "batch_size=64",
        "data.limit=200",
        f"data.cache_dir={cache_dir}",
        "projector.hidden=[32]",
        "projector.out=16",
        "evaluation.every=1",
        "evaluation.epochs=5",
        "evaluation.pictures=false",
        "tracking.log_every=1",
        "precision=float32",
    ]


@pytest.fixture(scope="session")
def fresh_store(tmp_path_factory):
    """A store as `mlflow_store.prepare` creates it. The migrations take seconds: tests copy the result."""
    pytest.importorskip("mlflow")
    directory = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr(mlflow_store, "STORE_TIMEOUT_S", math.inf)
        mlflow_store.prepare()
    return directory / "mlflow.db"


@pytest.fixture
def client(fresh_store, tmp_path, monkeypatch):
    """The current folder is an empty one with a store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(tracker, "SLOW_DELIVERY_S", math.inf)  # what a busy machine takes long for is no slow store
    shutil.copy(fresh_store, tmp_path / "mlflow.db")
    return mlflow_store.prepare()
