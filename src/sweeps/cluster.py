"""The base class of the launchers for clusters, whose jobs outlive the command and are found again by their ids.

The sweep's folder ``jobs/`` has three files for each job: ``NAME.id``, the scheduler and its job id; ``NAME.log``, the
output; and, once the job has ended, ``NAME.status``, its exit status. The command only waits for the jobs; if it is
repeated, it waits for those that the scheduler still has. A scheduler may start a stopped job again, so an exit status
other than 0 counts only when the scheduler no longer has the job.
"""

from __future__ import annotations

import sys
import time
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from src.errors import UsageError
from src.sweeps.jobs import Job
from src.sweeps.launcher import JobLauncher
from src.sweeps.worker import Work
from src.system.atomic_write import write_whole
from src.system.extras import require
from src.system.stopping import Stopper


@dataclass
class JobState:
    """A scheduler's answer about a job: its phase, and the reason or the place."""

    phase: Literal["waits", "cannot start", "runs", "is gone"]
    why: str = ""


@dataclass
class Submitted:
    """A job that has been submitted to a scheduler."""

    job: Job
    id: str
    last_state: JobState | None = None  # the scheduler's last answer about it
    gone_since: float | None = None  # when the scheduler first no longer had it (time.monotonic)


class SchedulerSilent(Exception):  # noqa: N818
    """The scheduler does not answer."""


class ClusterLauncher(JobLauncher):
    """Submits the jobs to a scheduler, and waits for each of them."""

    engine: str  # the scheduler's name in messages
    package: str  # the module that talks to the scheduler
    extra: str  # this project's extra that installs the module
    pause = 1.0
    ask_seconds = 10.0  # between two requests to the scheduler
    grace_seconds = 20.0  # how late a shared file system may show a job's status

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        require(self.package, self.extra, f"hydra/launcher={self.extra}")
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        if config.get("resume") == "never":
            raise UsageError(
                f"resume=never: {self.engine} may start a job again, and the same command waits for the jobs that it "
                "knows; leave it out, or delete the runs that are to begin anew"
            )
        self.submitted: list[Submitted] = []
        self.asked = 0.0
        self.silent = ""

    @abstractmethod
    def submit(self, work: Mapping[str, Work]) -> Sequence[str]:
        """Submit jobs, given by name, to the scheduler; return their ids in the same order.

        Raises:
            UsageError: the scheduler refuses a job.
        """

    @abstractmethod
    def unrecorded(self, logs: Collection[Path]) -> Mapping[Path, str]:
        """Find the ids of jobs that a killed command submitted but did not record, by the paths of their logs.

        The result may also have jobs that ended long ago or have other logs.

        Raises:
            SchedulerSilent: the scheduler does not answer.
        """

    @abstractmethod
    def job_states(self, ids: Collection[str]) -> Mapping[str, JobState]:
        """Ask the scheduler for the states of jobs; those that it does not know are left out.

        Raises:
            SchedulerSilent: the scheduler does not answer.
        """

    @abstractmethod
    def cancel(self, job_id: str) -> None:
        """Remove a waiting job from the scheduler's queue."""

    @abstractmethod
    def how_to_stop(self, ids: Sequence[str]) -> str:
        """The command that a user types to stop jobs."""

    def start(self, jobs: Sequence[Job], stopper: Stopper) -> None:  # noqa: ARG002
        """Find the jobs that the scheduler already has, and submit the others."""
        self._file(jobs[0], "log").parent.mkdir(parents=True, exist_ok=True)
        before = {job: known for job in jobs if (known := self._known(job))}
        unknown = {self._file(job, "log").resolve(): job for job in jobs if job not in before}
        try:
            before |= {unknown[log]: found for log, found in self.unrecorded(unknown).items() if log in unknown}
            job_states = self.job_states(set(before.values())) if before else {}
        except SchedulerSilent as silence:
            raise UsageError(
                f"{self.engine} may still run jobs of this sweep, but {silence}; try again later"
            ) from None
        fresh = []
        for job in jobs:
            state = job_states.get(before.get(job, ""), JobState("is gone"))
            if state.phase == "is gone":
                fresh.append(job)
            else:
                self._note(job, before[job], "is with {} already, as {}")
        if not fresh:
            return
        for job in fresh:
            self._file(job, "status").unlink(missing_ok=True)
            self._file(job, "id").unlink(missing_ok=True)
        ids = self.submit({job.directory.name: self._work(job) for job in fresh})
        for job, job_id in zip(fresh, ids, strict=True):
            self._note(job, job_id, "is submitted to {} as {}")

    def _note(self, job: Job, job_id: str, what: str) -> None:
        write_whole(self._file(job, "id"), f"{self.engine} {job_id}".encode())
        self.say(job, f"{what.format(self.engine, job_id)}: {self.describe(job)} ({self._file(job, 'log')})")
        self.submitted.append(Submitted(job, job_id))

    def _work(self, job: Job) -> Work:
        minutes = [] if self.config.max_minutes is None else [f"max_minutes={self.config.max_minutes}"]
        return Work(
            [*self.command(job), *minutes],
            Path.cwd(),
            self._file(job, "log").resolve(),
            self._file(job, "status").resolve(),
            self.environment(),
        )

    def _file(self, job: Job, kind: str) -> Path:
        return self.sweep.directory / "jobs" / f"{job.directory.name}.{kind}"

    def _known(self, job: Job) -> str:
        path = self._file(job, "id")
        engine, _, job_id = path.read_text().partition(" ") if path.exists() else ("", "", "")
        return job_id if engine == self.engine else ""

    def ended(self, stopper: Stopper) -> list[Job]:
        """Collect the jobs whose status is 0 and, every `ask_seconds`, those that have failed or can never start.

        If the command has been told to stop, leave all jobs to the scheduler, and return them.
        """
        if stopper.status:
            return self._leave(stopper.status)
        # The folder is listed once, because on a shared disk it takes long to try to open a file for each job.
        noted = {path.stem for path in (self.sweep.directory / "jobs").glob("*.status")}
        over = [each for each in self.submitted if each.job.directory.name in noted and self._status(each.job) == 0]
        for each in over:
            self._conclude(each, 0)
        if time.monotonic() > self.asked + self.ask_seconds:
            self.asked = time.monotonic()
            over += self._ask([each for each in self.submitted if each not in over])
        self.submitted = [each for each in self.submitted if each not in over]
        return [each.job for each in over]

    def _leave(self, status: int) -> list[Job]:
        ids = [each.id for each in self.submitted]
        print(f"{len(ids)} jobs stay with {self.engine}; the same command waits for them again", flush=True)
        print(f"to stop them: {self.how_to_stop(ids)}", flush=True)
        for each in self.submitted:
            each.job.error, each.job.status = f"it is still with {self.engine}, as {each.id}", status
        left, self.submitted = self.submitted, []
        return [each.job for each in left]

    def _ask(self, waiting: Sequence[Submitted]) -> list[Submitted]:
        if not waiting:
            return []
        try:
            job_states = self.job_states({each.id for each in waiting})
        except SchedulerSilent as silence:
            if self.silent != str(silence):
                print(f"{silence}; waiting until it does", file=sys.stderr, flush=True)
            self.silent = str(silence)
            return []
        self.silent = ""
        nothing = JobState("is gone", f"{self.engine} no longer knows it")
        return [each for each in waiting if self._is_over(each, job_states.get(each.id, nothing))]

    def _is_over(self, each: Submitted, state: JobState) -> bool:
        """Print what is new about a job, and return whether it has ended."""
        if state.phase == "cannot start":
            self.cancel(each.id)
            self._fail(each, f"{self.engine} can never start it ({state.why}); it has been cancelled")
            return True
        if state.phase != "is gone":
            if state not in (each.last_state, JobState("waits")):
                self.say(each.job, f"({each.id}) {': '.join(filter(None, [state.phase, state.why]))}")
            each.last_state, each.gone_since = state, None
            return False
        if (status := self._status(each.job)) is not None:
            self._conclude(each, status)
            return True
        each.gone_since = each.gone_since or time.monotonic()
        if time.monotonic() < each.gone_since + self.grace_seconds:
            return False
        self._fail(each, f"it ended without a result: {state.why}")
        return True

    def _status(self, job: Job) -> int | None:
        try:
            return int(self._file(job, "status").read_text())
        except FileNotFoundError:
            return None

    def _conclude(self, each: Submitted, status: int) -> None:
        log = self._file(each.job, "log")
        output = log.read_text(errors="replace") if log.exists() else ""
        self.conclude(each.job, status, output, log)

    def _fail(self, each: Submitted, error: str) -> None:
        self.say(each.job, f"({each.id}) failed: {error}")
        each.job.error, each.job.status = error, 1
