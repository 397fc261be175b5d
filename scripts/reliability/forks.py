"""Commands in forks of a process that has already imported everything, which saves seconds at each start.

A fork calls `src.cli` as ``python -m src.COMMAND`` does, with its own command line, folder and environment. The process
that forks must have only one thread.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import faiss
import matplotlib.pyplot
import optuna
import scipy.stats
import sklearn.datasets
import threadpoolctl
import torch
import torch._dynamo
import torchvision

from scripts.reliability.runs import environment
from src.evaluation import evaluate
from src.reporting import curves, pictures, report
from src.runs import mlflow_store, tracker
from src.sweeps import optuna_study, study_sweeper
from src.training import run

IMPORTED = (
    *(faiss, matplotlib, optuna, scipy, sklearn, torch, torchvision),
    *(curves, evaluate, optuna_study, pictures, report, run, study_sweeper, tracker),
)  # imported before the forks, so that no child has to import them

Entry = Callable[[], object]  # a function of src.cli that runs a command


class Fork:
    """A child process that runs a command, with the methods of `subprocess.Popen` that the campaigns use.

    Args:
        entry: the function to call.
        folder: the working directory, created if missing.
        arguments: the command line after ``python -m src.COMMAND``.
        said: the file to which the output is appended.
        more: additional environment variables.
    """

    def __init__(self, entry: Entry, folder: Path, arguments: Sequence[str], said: Path, **more: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        said.touch()  # so that it can be read at any time
        self.args = arguments
        self._process = multiprocessing.get_context("fork").Process(
            target=_run, args=(entry, folder, arguments, said, more)
        )
        self._process.start()

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while the command runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the command, and return the exit status.

        Raises:
            subprocess.TimeoutExpired: the command still runs after ``timeout`` seconds.
        """
        self._process.join(timeout)
        if (status := self.poll()) is None:
            raise subprocess.TimeoutExpired(list(self.args), timeout or 0)
        return status

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()


def prepare() -> None:
    """Import MLflow and limit this process to one thread; call this before the first fork."""
    mlflow_store.import_mlflow()
    torch.set_num_threads(1)
    threadpoolctl.threadpool_limits(1)
    gc.freeze()  # keeps each child's garbage collector from writing to, and so copying, every page


def _run(entry: Entry, folder: Path, arguments: Sequence[str], said: Path, more: dict[str, str]) -> None:
    os.setsid()  # a new session, like that of a command in its own terminal
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
        os.dup2(source, stream)
    os.chdir(folder)
    present = environment(**more)
    os.environ.clear()
    os.environ.update(present)
    sys.argv = ["src", *arguments]
    entry()
