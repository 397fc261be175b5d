"""Settings and fixtures that all tests share."""

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
from hydra.core.global_hydra import GlobalHydra
from hypothesis import settings

from src import cli
from src.runs import mlflow_store, tracker
from src.system.environment import PROJECT

# Hypothesis has no deadline, so that a busy machine fails no test, and draws the same examples in every run, so that
# chance fails none either. With the variable CASES set, as by `make reliability`, the examples are random.
settings.register_profile("same", deadline=None, derandomize="CASES" not in os.environ)
settings.load_profile("same")

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, the processes that tests start would inherit "ignored"

# The environment in which this project's commands run when the current folder is not the project.
ELSEWHERE = {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
CIFAR100 = Path(os.environ.get("CIFAR100_ROOT", PROJECT.parent / "shared" / "data" / "cifar100"))


def pytest_configure():
    """Unset variables that would let a test write to a team's MLflow server, or act as a rank of torchrun."""
    for name in ("MLFLOW_TRACKING_URI", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ.pop("HYDRA_FULL_ERROR", None)


def pytest_collection_modifyitems(items):
    # Slow tests come first: one that begins last would keep a single worker busy while the others are idle.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
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
    """The folder of decoded images that all tests of a session share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def python():
    """Path of a program that runs ``python -m MODULE`` in a fork that has done its imports (`tests.warm`)."""
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

    ``anew=True`` starts a new interpreter, for tests that set variables which are read during imports.
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


@pytest.fixture
def typed(tmp_path, monkeypatch, capsys):
    """A function that runs a command in this process, in the test's own folder; returns its status, stdout and stderr.

    `command` runs it as a user does, which takes seconds.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    for name in ("outlive_output", "redact_output"):  # they change the streams of this process
        monkeypatch.setattr(cli, name, lambda: None)

    def run(entry, *arguments):
        monkeypatch.setattr(sys, "argv", ["src", *arguments])
        status = 0
        try:
            entry()
        except SystemExit as end:
            status = end.code
        finally:
            GlobalHydra.instance().clear()
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def small(cache_dir):
    """Overrides for a run of a second or two: digits at their native 8x8 pixels, the tiny ResNet, narrow heads."""
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
    """An empty store, as `mlflow_store.prepare` creates it. The migrations take seconds, so tests copy this file."""
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
    """A client of a new MLflow store in the test's own folder, which becomes the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(tracker, "SLOW_DELIVERY_S", math.inf)  # on a busy machine no delivery counts as slow
    # The next test may have a store at the same path, and SQLAlchemy 2 would keep the connection to this one.
    monkeypatch.setenv("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
    shutil.copy(fresh_store, tmp_path / "mlflow.db")
    return mlflow_store.prepare()
