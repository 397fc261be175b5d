"""``hydra/launcher=local``: each job of a sweep is a process of its own, ``jobs`` of them at a time.

Jobs do not share a pool of processes, so that a job which is killed or runs out of memory does not end another one, the
memory of a job goes back to the system, and threads and GPU are set before any library loads. A process runs the very
command that a user would type.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from src.sweeps.jobs import Job
from src.sweeps.launcher import JobLauncher
from src.sweeps.worker import end_with_parent
from src.system.output import in_terminal
from src.system.stopping import Stopper
from src.system.threads import cores


@dataclass
class Process:
    """A running job."""

    job: Job
    slot: int
    started: float
    process: subprocess.Popen[bytes]
    log: IO[bytes]


class LocalLauncher(JobLauncher):
    """Starts a process for every job.

    The first signal to stop is passed on to the jobs, which save and stop, and no further job is started. A second
    signal ends everything at once. ``max_minutes`` counts for all jobs together.

    Each job has a log, ``N.log`` in the sweep's folder, or ``N.2.log`` if an earlier command has left that one. A job
    that runs alone, outside a terminal, prints to the sweep's own output.

    Args:
        jobs: how many jobs run at once; None: one. If several do, each gets its share of the threads, and one of the
            GPUs in turn.
    """

    at_a_time: int
    pause = 0.05

    def __init__(self, jobs: int | None) -> None:
        self.at_a_time = jobs or 1

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        self.max_minutes = config.max_minutes
        self.processes: list[Process] = []
        self.passed_on = 0
        # Whether a job prints to the sweep's own output: there are no bars, and no other job prints in between.
        self.prints = self.at_a_time == 1 and not in_terminal()

    def start(self, jobs: Sequence[Job], stopper: Stopper) -> None:
        """Start each job in a free slot."""
        for job in jobs:
            taken = {each.slot for each in self.processes}
            slot = next(each for each in range(self.at_a_time) if each not in taken)
            command = self.command(job)
            if self.max_minutes is not None:
                left = max(stopper.deadline - time.monotonic(), 0.1) / 60
                command = [each for each in command if not each.startswith("max_minutes=")]
                command.append(f"max_minutes={left:.4f}")
            self.processes.append(self._start(job, slot, command))

    def _start(self, job: Job, slot: int, command: list[str]) -> Process:
        number, session = self.numbers[job], 1
        path = self.sweep.directory / f"{number}.log"
        while path.exists():  # left by an earlier command, which may have numbered the jobs differently
            session += 1
            path = self.sweep.directory / f"{number}.{session}.log"
        log = path.open("x+b")
        self.say(job, f"starts: {self.describe(job)} ({path})")
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=None if self.prints else log,
            stderr=log,
            env=self.environment() | self._slot_environment(slot),
            # Outside the terminal's process group, so that Ctrl-C reaches a job only once, through the launcher.
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        return Process(job, slot, time.monotonic(), process, log)

    def _slot_environment(self, slot: int) -> dict[str, str]:
        """The variables that limit a job to its share of the threads and to one of the GPUs; none if it runs alone."""
        if self.at_a_time == 1:
            return {}
        variables = {"OMP_NUM_THREADS": str(max(1, _threads() // self.at_a_time))}
        if gpus := _visible_gpus():
            variables["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
        return variables

    def logs(self) -> Mapping[str, Path]:
        return {f"job {self.numbers[each.job]}": Path(each.log.name) for each in self.processes}

    def ended(self, stopper: Stopper) -> list[Job]:
        """Pass the first signal to stop on to the jobs, and collect the processes that have ended."""
        if stopper.signal and not self.passed_on:
            self.passed_on = signal.SIGTERM if stopper.signal == signal.SIGPIPE else stopper.signal
            for each in self.processes:
                each.process.send_signal(self.passed_on)
        over = [each for each in self.processes if each.process.poll() is not None]
        for each in over:
            self.processes.remove(each)
            self._collect(each)
        return [each.job for each in over]

    def _collect(self, each: Process) -> None:
        status = each.process.returncode
        if self.passed_on and status == -self.passed_on:  # killed by the signal, because it was still loading
            status = 128 + self.passed_on
        each.log.seek(0)
        output = each.log.read().decode(errors="replace").strip()
        each.log.close()
        if self.prints and output:
            print(output, file=sys.stderr, flush=True)
        after = f" after {time.monotonic() - each.started:.0f} s"
        self.conclude(each.job, status, output, Path(each.log.name), after)


def _threads() -> int:
    """How many threads this process may use: the first number in OMP_NUM_THREADS, or else one per core."""
    told = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(told) if re.fullmatch(r"[1-9]\d{0,8}", told, re.ASCII) else cores()


def _visible_gpus() -> list[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES takes; none without a driver."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in named.split(",") if name.strip()]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(number) for number in range(len(listed.splitlines()))]
