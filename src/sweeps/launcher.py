"""The base class of the launchers: each job is a command ``python -m src.train OVERRIDES`` with a result of its own."""

from __future__ import annotations

import os
import signal
import sys
import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, ListConfig, OmegaConf

from src.config import identity
from src.config.explain import explain_key
from src.config.schema import Config
from src.errors import RunFailed, UsageError
from src.runs.directory import how_to_continue
from src.runs.record import TAG_SUPPORT_UNUSED
from src.sweeps.bars import Bars
from src.sweeps.jobs import (
    FINAL,
    NEVER,
    OBJECTIVE,
    OWN_FOLDER,
    SWEEP_KEYS,
    UNLABELLED,
    Composer,
    Job,
    preview_of,
    refuse_as_choice,
    refuse_equal_runs,
    refuse_other_folder,
    values,
)
from src.sweeps.sweep import Sweep
from src.system.environment import CONF
from src.system.stopping import PRUNED, Stopper, is_stop

TRACEBACKS = os.environ.get("HYDRA_FULL_ERROR", "0")  # the user's value, before cli.py overwrites it
FOREIGN = "returns all results or none; choose local, slurm or ray"  # what is wrong with the launchers of others


class JobLauncher(Launcher):
    """Starts jobs as soon as there is room for them, and prints how each one ends; one that fails stops no other.

    A subclass defines how jobs are started and how their end is noticed. The sweepers of this project call `run`; those
    of Hydra and of plugins, such as hydra-optuna-sweeper, call `launch` for one batch of jobs after another.
    """

    at_a_time: int | None  # how many jobs run at once; None: all of them
    pause: float  # seconds between two checks for jobs that have ended
    max_minutes: float | None = None  # for all jobs together; None: no limit

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:  # noqa: ARG002
        self.config, hydra = config, config.hydra
        if str(self._directions()[0]).endswith("minimize"):  # the default of hydra-optuna-sweeper
            raise UsageError(f"hydra.sweeper.direction=maximize: is missing; the search would minimise {OBJECTIVE}")
        flags = {"main": "--config-path", "command-line": "--config-dir"}
        sources = [each for each in hydra.runtime.config_sources if each.path != str(CONF) and each.provider in flags]
        name = hydra.job.config_name
        self.files = [  # options by which a job finds the config files of the sweep
            *(f"{flags[each.provider]}={each.path}" for each in sources),
            *([] if name == "train" else [f"--config-name={name}"]),
            *(each for each in hydra.overrides.hydra if each.startswith("hydra.searchpath=")),
        ]
        self.status = 0  # the exit status of what stopped the sweep; 0: nothing
        self.numbers: dict[Job, int] = {}
        self.launched: dict[str, Job] = {}  # the jobs of all batches so far, each distinct configuration once
        self.hydra_context = hydra_context

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:  # noqa: ARG002
        """Run a batch of jobs for a sweeper of Hydra or of a plugin, and return what it judges each one by.

        Such a sweeper does not say which batch is the last, so each batch ends with a summary of all jobs so far. The
        same command has the same folder, and does not run finished jobs again.

        Raises:
            UsageError: the command is refused (`_refuse`); nothing has run.
            SystemExit: the jobs were stopped, or this is a dry run.
        """
        hydra = self.config.hydra
        name = hydra.runtime.choices["hydra/sweeper"]
        batch = [self._composer.identify(self._composer(overrides)) for overrides in job_overrides]
        legal = [job.cfg for job in batch if job.cfg]
        if not self.launched:  # a mistake of the command shows in the first batch; later, a trial may fail alone
            self._refuse(job_overrides[0], batch, legal)
        if self.config.dry_run:
            print(preview_of(batch, self.at_a_time or len(legal)))
            print(f"this is the first batch; hydra/sweeper={name} proposes the others by what comes out")
            sys.exit(2 if len(legal) < len(batch) else 0)
        batch = [self.launched.setdefault(job.configuration, job) for job in batch]
        tracking = next(job.cfg.tracking for job in self.launched.values() if job.cfg)
        what = sorted(each for each in hydra.overrides.task if each.split("=")[0] not in SWEEP_KEYS)
        what.append(OmegaConf.to_yaml(hydra.sweeper))
        pending = list(dict.fromkeys(job for job in batch if job.cfg and not job.is_finished))
        shown = {each.split("=")[0] for job in batch for each in job.overrides}
        began = time.monotonic()
        with Sweep(name, what, list(self.launched.values()), tracking) as sweep:
            sweep.repeats = OmegaConf.select(hydra.sweeper, "sampler.seed") is not None
            for _ in self.run(sweep, pending, shown, self.at_a_time):
                pass
        if self.max_minutes is not None:  # the limit is for all batches together
            self.max_minutes -= (time.monotonic() - began) / 60
        if self.status:
            sys.exit(sweep.status)
        return [self._judged(job) for job in batch]

    @cached_property
    def _composer(self) -> Composer:
        """Serves all batches, so that each choice of options is composed once, and images are looked for once."""
        return Composer(self.hydra_context.config_loader, self.config)

    def _refuse(self, overrides: Sequence[str], batch: Sequence[Job], legal: Sequence[Config]) -> None:
        """Refuse a command whose jobs the sweeper could not judge.

        Args:
            overrides: those of the first job.
            batch: the jobs of the first batch.
            legal: the configs of those that are legal.

        Raises:
            UsageError: the command sets what no sweep can have, or every job of the first batch is not legal.
        """
        sweeper = self.config.hydra.sweeper
        refuse_other_folder(self.config.hydra.sweep)
        params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
        parsed = self._composer.parser.parse_overrides([*params, *self.config.hydra.overrides.task])
        swept = [override for override in parsed if len(values(override) or ()) != 1]
        for override in swept:
            refuse_equal_runs(override)
            if self.config.hydra.runtime.choices["hydra/sweeper"] != "basic":  # Hydra's own, which does not choose
                refuse_as_choice(override)
        if not legal:
            raise UsageError(batch[0].error)
        if unused := self._composer.unused(overrides, {override.key_or_group: override for override in swept}):
            raise UsageError(explain_key(min(unused), sorted(identity.flat(legal[0]))))
        for refused, why in (
            (any(cfg.data.final for cfg in legal), FINAL),
            (any(cfg.output_dir for cfg in legal), OWN_FOLDER),
            (any(cfg.resume == "never" for cfg in legal), NEVER),
        ):
            if refused:
                raise UsageError(why)

    def _judged(self, job: Job) -> JobReturn:
        """Return a job's `OBJECTIVE`, beside its number of stored vectors if there are two directions, or its error."""
        result = job.result
        returned = JobReturn(overrides=job.overrides, status=JobStatus.FAILED)
        if not result:
            returned.return_value = RunFailed(f"{job.label}: {job.reason}")
        elif OBJECTIVE not in result.metrics:
            returned.return_value = RunFailed(f"{job.label}: {UNLABELLED}")
        elif TAG_SUPPORT_UNUSED in result.tags:  # reports leave it out, so it must not be the best
            returned.return_value = RunFailed(f"{job.label}: its support set was never filled")
        else:
            returned.status = JobStatus.COMPLETED
            value = result.metrics[OBJECTIVE]
            values = value, int(result.params["support_set_size"])
            returned.return_value = value if len(self._directions()) == 1 else values
        return returned

    def _directions(self) -> Sequence[Any]:
        """The directions of a search, as hydra-optuna-sweeper names them; a sweeper that has none gives [None]."""
        found = self.config.hydra.sweeper.get("direction")
        return list(found) if isinstance(found, ListConfig) else [found]

    def run(self, sweep: Sweep, jobs: Iterable[Job], shown: set[str], at_a_time: int | None) -> Iterator[Job]:
        """Start the jobs, and yield each one when it has ended, with its ``error`` and ``status`` filled in.

        The next job is taken only when there is room for it, so that a search proposes it knowing how the others ended.
        When the sweep is stopped, no further job is taken, and those of ``sweep.jobs`` that have not started say so.

        Args:
            sweep: the sweep of the jobs; files about them go to its folder.
            jobs: the jobs to start, in order.
            shown: the keys of the settings that are printed when a job starts.
            at_a_time: how many jobs run at once; None: all of them.
        """
        self.sweep, self.shown = sweep, shown
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
        for job in sweep.jobs if self.status else ():
            if job.cfg and not job.status and not job.is_finished:
                job.error, job.status = "not started: the sweep was stopped", self.status

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
