"""``hydra/launcher=local``: each job of a sweep is a process of its own, ``jobs`` of them at a time.

A process a job, rather than a pool that several share: a job that is killed or runs out of memory takes no other with
it, memory goes back to the system, threads and GPU are set before anything loads, and what runs is the very command
that a user would type.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from src.errors import UsageError
from src.system.stopping import PRUNED, Stopper, is_stop

# Worth a word when a job starts, as is all in which the jobs differ.
SWEPT = {"method", "support", "objective", "k", "queue_size", "seed"}


def refuse_foreign_sweeper(hydra: Any) -> None:
    """A sweeper of Hydra's own, or of a plugin, waits for values that a job in a process of its own does not return.

    Raises:
        UsageError: the sweeper is not one of this project's.
    """
    if not hydra.sweeper._target_.startswith("hydra_plugins.support_sets."):
        chosen = hydra.runtime.choices.get("hydra/sweeper", hydra.sweeper._target_)
        raise UsageError(
            f"hydra/sweeper={chosen}: leave it out for a grid, or use +sweep=optuna for a search by Optuna"
        )


class JobFailed(Exception):  # noqa: N818
    """A job ended without its result.

    Args:
        reason: one line.
        status: its exit status; that of a process killed by a signal is the signal's number, negative.
    """

    def __init__(self, reason: str, status: int) -> None:
        super().__init__(reason, status)
        self.status = status

    def __str__(self) -> str:
        return self.args[0]


@dataclass
class Job:
    """A process that runs, and where it stands in the list."""

    place: int
    slot: int
    number: int  # in the sweep, counted from the launcher's first
    started: float
    process: subprocess.Popen[bytes]
    log: IO[bytes]


class LocalLauncher(Launcher):
    """Starts ``python -m src.train OVERRIDES`` for every job.

    The first signal to stop is passed on to the jobs, which save and stop; no other is started. A second ends
    everything at once. ``max_minutes`` counts for all jobs together.

    Args:
        jobs: how many at a time. With several, each gets its share of the threads, one GPU in turn, and a file for
            its output, ``N.log`` in the sweep's folder.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:  # noqa: ARG002
        refuse_foreign_sweeper(config.hydra)
        self.config = config
        sources = config.hydra.runtime.config_sources
        self.config_dir = [f"--config-dir={each.path}" for each in sources if each.provider == "command-line"]

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs; returns one `JobReturn` each, whose failure is a `JobFailed`."""
        self.folder = Path(self.config.hydra.sweep.dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        returns = [JobReturn(overrides=each) for each in job_overrides]
        times = Counter(each for overrides in job_overrides for each in overrides)
        self.swept = SWEPT | {each.split("=")[0] for each in times if times[each] < len(job_overrides)}
        waiting, running = deque(range(len(returns))), list[Job]()
        passed_on = 0
        with Stopper(self.config.max_minutes) as stopper:
            while running or (waiting and not stopper.status):
                while waiting and len(running) < self.jobs and not stopper.status:
                    place = waiting.popleft()
                    slot = min(set(range(self.jobs)) - {job.slot for job in running})
                    overrides = list(job_overrides[place])
                    if self.config.max_minutes is not None:
                        left = max(stopper.deadline - time.monotonic(), 0.1) / 60
                        overrides = [each for each in overrides if not each.startswith("max_minutes=")]
                        overrides.append(f"max_minutes={left:.4f}")
                    running.append(self._start(place, slot, overrides, initial_job_idx + place))
                if stopper.signal and not passed_on:
                    passed_on = signal.SIGTERM if stopper.signal == signal.SIGPIPE else stopper.signal
                    for job in running:
                        job.process.send_signal(passed_on)
                for job in [job for job in running if job.process.poll() is not None]:
                    running.remove(job)
                    self._collect(job, returns[job.place], passed_on)
                time.sleep(0.05)
        for place in waiting:
            _failed(returns[place], "not started: the sweep was stopped", stopper.status)
        return returns

    def _start(self, place: int, slot: int, overrides: list[str], number: int) -> Job:
        path = self.folder / f"{number}.log"
        log = path.open("w+b")
        swept = [each for each in overrides if each.split("=")[0] in self.swept]
        print(f"job {number} starts: {' '.join(swept)} ({path})", flush=True)
        process = subprocess.Popen(
            [sys.executable, "-m", "src.train", *self.config_dir, *overrides],
            stdin=subprocess.DEVNULL,
            stdout=log if self.jobs > 1 else None,
            stderr=log,
            env=os.environ | self._share(slot),
            # Apart from the terminal's group: Ctrl-C reaches a job through the launcher, once.
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        return Job(place, slot, number, time.monotonic(), process, log)

    def _share(self, slot: int) -> dict[str, str]:
        """The environment that gives a job its part of the machine."""
        if self.jobs == 1:
            return {}
        threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
        share = {"OMP_NUM_THREADS": str(max(1, threads // self.jobs))}
        if gpus := _visible_gpus():
            share["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
        return share

    def _collect(self, job: Job, returned: JobReturn, passed_on: int) -> None:
        status = job.process.returncode
        if passed_on and status == -passed_on:  # told to stop while it was still loading
            status = 128 + passed_on
        job.log.seek(0)
        output = job.log.read().decode(errors="replace").strip()
        job.log.close()
        if self.jobs == 1 and output:
            print(output, file=sys.stderr, flush=True)
        how = "finished" if status == 0 else "was pruned" if status == PRUNED else f"ended with status {status}"
        print(f"job {job.number} {how} after {time.monotonic() - job.started:.0f} s", flush=True)
        if status == 0:
            returned.status = JobStatus.COMPLETED
        elif status < 0:
            name = signal.Signals(-status).name
            hint = "; is there enough memory?" if name == "SIGKILL" else ""
            _failed(returned, f"its process was ended by {name}{hint}", status)
        elif status == PRUNED:
            _failed(returned, "pruned", status)
        elif is_stop(status):
            _failed(returned, "stopped; the same command continues", status)
        else:
            lines = output.splitlines() or [f"exit status {status}, see {job.log.name}"]
            _failed(returned, lines[-1].removeprefix("error: "), status)


def _failed(returned: JobReturn, reason: str, status: int) -> None:
    returned.status = JobStatus.FAILED
    returned.return_value = JobFailed(reason, status)


def _visible_gpus() -> list[str]:
    """The names by which CUDA knows the GPUs that this process may use; none where there is no driver."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in named.split(",") if name.strip()]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(number) for number in range(len(listed.splitlines()))]


def _end_with_parent() -> None:
    """Have the kernel stop this process, as SIGTERM would, when its parent is gone: no job outlives its sweep."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
