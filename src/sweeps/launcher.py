"""The base class of the launchers: each job is a command ``python -m src.train OVERRIDES`` with a result of its own."""

from __future__ import annotations

import os
import signal
import sys
import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from src.errors import UsageError
from src.runs.directory import how_to_continue
from src.sweeps.bars import Bars
from src.sweeps.jobs import Job
from src.sweeps.sweep import Sweep
from src.system.environment import CONF
from src.system.stopping import PRUNED, Stopper, is_stop

TRACEBACKS = os.environ.get("HYDRA_FULL_ERROR", "0")  # the user's value, before cli.py overwrites it


def refuse_foreign_sweeper(hydra: Any) -> None:
    """Refuse the sweepers of Hydra and of plugins: they wait for return values, which jobs do not give.

    Raises:
        UsageError: the sweeper is not one of this project's.
    """
    if not hydra.sweeper._target_.startswith("hydra_plugins.support_sets."):
        chosen = hydra.runtime.choices.get("hydra/sweeper", hydra.sweeper._target_)
        raise UsageError(
            f"hydra/sweeper={chosen}: leave it out for a grid, or use +sweep=optuna for a search by Optuna"
        )


class JobLauncher(Launcher):
    """Starts jobs as soon as there is room for them, and prints how each one ends; one that fails stops no other.

    A subclass defines how jobs are started and how their end is noticed. Hydra's own launchers run a function for all
    jobs and return all results or none, so the sweepers of this project accept only subclasses of this class.
    """

    at_a_time: int | None  # how many jobs run at once; None: all of them
    pause: float  # seconds between two checks for jobs that have ended
    max_minutes: float | None = None  # for all jobs together; None: no limit

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:  # noqa: ARG002
        refuse_foreign_sweeper(config.hydra)
        self.config, hydra = config, config.hydra
        flags = {"main": "--config-path", "command-line": "--config-dir"}
        sources = [each for each in hydra.runtime.config_sources if each.path != str(CONF) and each.provider in flags]
        name = hydra.job.config_name
        self.files = [  # options by which a job finds the config files of the sweep
            *(f"{flags[each.provider]}={each.path}" for each in sources),
            *([] if name == "train" else [f"--config-name={name}"]),
            *(each for each in hydra.overrides.hydra if each.startswith("hydra.searchpath=")),
        ]
        self.status = 0  # the exit status of what stopped the sweep; 0: nothing

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> NoReturn:
        """Raise an error: only Hydra's own sweepers call this, and `setup` refuses them."""
        raise NotImplementedError

    def run(self, sweep: Sweep, jobs: Iterable[Job], shown: set[str], at_a_time: int | None) -> Iterator[Job]:
        """Start the jobs, and yield each one when it has ended, with its ``error`` and ``status`` filled in.

        The next job is taken only when there is room for it, so that a search proposes it knowing how the others ended.
        When the sweep is stopped, no further job is taken.

        Args:
            sweep: the sweep of the jobs; files about them go to its folder.
            jobs: the jobs to start, in order.
            shown: the keys of the settings that are printed when a job starts.
            at_a_time: how many jobs run at once; None: all of them.
        """
        self.sweep, self.shown = sweep, shown
        self.numbers: dict[Job, int] = {}
        left, running = iter(jobs), list[Job]()
        total = len(jobs) if isinstance(jobs, Sized) else None
        with Stopper(self.max_minutes) as stopper, Bars(total) as bars:
            while True:
                if not stopper.status:
                    room = None if at_a_time is None else at_a_time - len(running)
                    batch = list(islice(left, room))
                    for job in batch:
                        self.numbers[job] = len(self.numbers)
                    if batch:
                        self.start(batch, stopper)
                    running += batch
                if not running:
                    break
                for job in self.ended(stopper):
                    running.remove(job)
                    bars.count()
                    yield job
                bars.look(self.logs())
                time.sleep(self.pause)
            self.status = stopper.status

    @abstractmethod
    def start(self, jobs: Sequence[Job], stopper: Stopper) -> None:
        """Start the jobs."""

    @abstractmethod
    def ended(self, stopper: Stopper) -> list[Job]:
        """Return the jobs that have ended since the last call."""

    def logs(self) -> Mapping[str, Path]:
        """The log of each running job, by the job's name on its bar; empty if running jobs have no bars."""
        return {}

    def command(self, job: Job) -> list[str]:
        """The command that a user would type for the job alone, with what the sweep adds to it."""
        return [sys.executable, "-m", "src.train", *self.files, *job.overrides, *self.sweep.overrides(job)]

    def environment(self) -> dict[str, str]:
        """The environment variables of a job."""
        return os.environ | {"HYDRA_FULL_ERROR": TRACEBACKS}

    def say(self, job: Job, what: str) -> None:
        """Print a line about a job."""
        print(f"job {self.numbers[job]} {what}", flush=True)

    def describe(self, job: Job) -> str:
        """The job's overrides of the keys that are to be printed."""
        return " ".join(each for each in job.overrides if each.split("=")[0] in self.shown)

    def conclude(self, job: Job, status: int, output: str, log: Path, after: str = "") -> None:
        """Print how a job ended, and fill in its ``status`` and ``error``.

        Args:
            job: the job.
            status: its exit status; if a signal killed the process, the negative number of the signal.
            output: what the job printed; if it failed, the last line is taken for the reason.
            log: the file of the output.
            after: how long the job took, in words.
        """
        how = {0: "finished", PRUNED: "was pruned"}.get(status, f"ended with status {status}")
        self.say(job, f"{how}{after}")
        job.status = status
        if status < 0:
            name = next((each.name for each in signal.Signals if each == -status), f"signal {-status}")
            job.error = f"its process was ended by {name}{'; is there enough memory?' if name == 'SIGKILL' else ''}"
        elif status == PRUNED:
            job.error = "pruned"
        elif is_stop(status):
            job.error = f"stopped; {how_to_continue(job.cfg, job.directory)}"
        elif status:
            lines = output.strip().splitlines() or [f"exit status {status}, see {log}"]
            job.error = lines[-1].removeprefix("error: ")
