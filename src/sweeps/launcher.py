"""What the launchers have in common: each job is the command ``python -m src.train OVERRIDES``, collected by itself."""

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

TRACEBACKS = os.environ.get("HYDRA_FULL_ERROR", "0")  # what the user set, before cli.py overwrites it


def refuse_foreign_sweeper(hydra: Any) -> None:
    """Refuse sweepers of Hydra or of plugins: they wait for return values, and jobs in other processes give none.

    Raises:
        UsageError: the sweeper is not one of this project's.
    """
    if not hydra.sweeper._target_.startswith("hydra_plugins.support_sets."):
        chosen = hydra.runtime.choices.get("hydra/sweeper", hydra.sweeper._target_)
        raise UsageError(
            f"hydra/sweeper={chosen}: leave it out for a grid, or use +sweep=optuna for a search by Optuna"
        )


class JobLauncher(Launcher):
    """Starts jobs as there is room for them, and says how each of them ends; one that fails stops no other.

    A subclass says how jobs are started and how it is known that they have ended. Hydra's own launchers run a function
    for all jobs and return all results or none, so the sweepers here take only these.
    """

    at_a_time: int | None  # how many jobs; None: all of them
    pause: float  # seconds between two looks at the jobs
    max_minutes: float | None = None  # for all jobs together

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:  # noqa: ARG002
        refuse_foreign_sweeper(config.hydra)
        self.config, hydra = config, config.hydra
        flags = {"main": "--config-path", "command-line": "--config-dir"}
        sources = [each for each in hydra.runtime.config_sources if each.path != str(CONF) and each.provider in flags]
        name = hydra.job.config_name
        self.files = [  # of which jobs are composed
            *(f"{flags[each.provider]}={each.path}" for each in sources),
            *([] if name == "train" else [f"--config-name={name}"]),
            *(each for each in hydra.overrides.hydra if each.startswith("hydra.searchpath=")),
        ]
        self.status = 0  # that of whatever stopped the sweep

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> NoReturn:
        """What Hydra's own sweepers call, and `setup` refuses."""
        raise NotImplementedError

    def run(self, sweep: Sweep, jobs: Iterable[Job], shown: set[str], at_a_time: int | None) -> Iterator[Job]:
        """Start the jobs, and yield each when it has ended, its ``error`` and ``status`` filled in.

        A job is asked for when there is room for it: a search proposes it knowing how the others ended. When the sweep
        is stopped, no other is asked for.

        Args:
            sweep: whose jobs they are; files about them go to its folder.
            jobs: those to start, in order.
            shown: the keys that the line about a job's start shows.
            at_a_time: how many; None: all of them.
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
        """Those of the jobs that have ended since the last call."""

    def logs(self) -> Mapping[str, Path]:
        """Where running jobs print, by what a bar calls them; nothing where only their end is known."""
        return {}

    def command(self, job: Job) -> list[str]:
        """What a user would type for the job alone, and what the sweep tells it."""
        return [sys.executable, "-m", "src.train", *self.files, *job.overrides, *self.sweep.overrides(job)]

    def environment(self) -> dict[str, str]:
        """The variables of a job."""
        return os.environ | {"HYDRA_FULL_ERROR": TRACEBACKS}

    def say(self, job: Job, what: str) -> None:
        """Print a line about a job."""
        print(f"job {self.numbers[job]} {what}", flush=True)

    def describe(self, job: Job) -> str:
        """Its settings of those keys that are shown."""
        return " ".join(each for each in job.overrides if each.split("=")[0] in self.shown)

    def conclude(self, job: Job, status: int, output: str, log: Path, after: str = "") -> None:
        """Say how a job ended, and note it.

        Args:
            job: which.
            status: its exit status; that of a process killed by a signal is the signal's number, negative.
            output: what it printed, of which the last line may be the reason.
            log: where that is.
            after: how long it took, in words.
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
