"""Commands in forks of a process that has imported everything already, which saves seconds of each start.

A fork calls `src.cli` as ``python -m src.COMMAND`` does, with a command line, a folder and an environment of its own.
The process that forks must have no other thread.
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
)  # before the forks, so that no child has to

Entry = Callable[[], object]  # a command of src.cli


class Fork:
    """A child process that runs a command, with the methods of `subprocess.Popen` that the campaigns use.

    Args:
        entry: what to call.
        folder: the working directory, created if absent.
        arguments: what follows ``python -m src.COMMAND``.
        said: the file to which its output is appended.
        more: environment variables besides this process's own.
    """

    def __init__(self, entry: Entry, folder: Path, arguments: Sequence[str], said: Path, **more: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        said.touch()  # so that it can be read at once
        self.args = arguments
        self._process = multiprocessing.get_context("fork").Process(
            target=_type, args=(entry, folder, arguments, said, more)
        )
        self._process.start()

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end, and return the exit status.

        Raises:
            subprocess.TimeoutExpired: it still runs after so many seconds.
        """
        self._process.join(timeout)
        if (status := self.poll()) is None:
            raise subprocess.TimeoutExpired(list(self.args), timeout or 0)
        return status

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()


def prepare() -> None:
    """Load the rest, and leave this process one thread; call it before the first fork."""
    mlflow_store.import_mlflow()
    torch.set_num_threads(1)
    threadpoolctl.threadpool_limits(1)
    gc.freeze()  # else each child's garbage collector writes to, and so copies, every page


def _type(entry: Entry, folder: Path, arguments: Sequence[str], said: Path, more: dict[str, str]) -> None:
    os.setsid()  # a session of its own, as a command has that is typed in a terminal of its own
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
        os.dup2(source, stream)
    os.chdir(folder)
    present = environment(**more)
    os.environ.clear()
    os.environ.update(present)
    sys.argv = ["src", *arguments]
    entry()
