"""Running a job on a machine of a cluster: its command, with a log of its output and a note of its exit status.

Few modules are imported here, because beside every job a process of the scheduler loads them too.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from src.system.atomic_write import write_whole
from src.system.stopping import TIME_IS_UP


@dataclass
class Work:
    """A job, as it is submitted to a cluster. submitit calls it, and calls `checkpoint` before a time limit.

    If a job has several tasks, each of them calls it and starts a rank of the run. Before a time limit only the first
    is told to stop, and the ranks stop together (`src.training.distributed.Ranks.max_status`).
    """

    command: Sequence[str]
    folder: Path  # the command's working folder
    log: Path  # the command's output is appended to that of earlier attempts
    note: Path  # gets the exit status; absent before the end
    environment: Mapping[str, str]  # the variables that the machine does not set itself

    def __call__(self) -> int:
        """Run the job to its end, or until submitit's signal handler puts it back into the queue and exits."""
        self.start()
        try:
            return self.wait()
        except Exception:  # submitit has put the job back too often; the job has saved, and can continue
            write_whole(self.note, str(TIME_IS_UP).encode())
            raise

    def checkpoint(self) -> Any:
        """Stop the job, which saves, and return the same work, for submitit to queue again."""
        from submitit.helpers import DelayedSubmission

        self.stop(signal.SIGUSR1)
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(replace(self))

    def start(self) -> None:
        """Start the process."""
        rank = as_rank()
        self.first = rank.get("RANK", "0") == "0"  # all ranks of a run end alike, so only one notes it
        if self.first:
            self.note.unlink(missing_ok=True)
        cores = os.environ.get("SLURM_CPUS_PER_TASK")
        environment = {**self.environment, **os.environ, **rank}
        # The scheduler may have passed on the variable of the sweep's command, which cli.py sets for itself.
        environment["HYDRA_FULL_ERROR"] = self.environment.get("HYDRA_FULL_ERROR", "0")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment | ({"OMP_NUM_THREADS": cores} if cores else {}),
                preexec_fn=_prepare_process,
            )

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Tell the process to save and stop."""
        self.process.send_signal(number)

    def wait(self) -> int:
        """Wait for the process, note its exit status, and return it."""
        # Popen.wait holds a lock; a signal handler that interrupts it and waits as well would never get the lock.
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        status = self.process.wait()
        if self.first:
            write_whole(self.note, str(status).encode())
        return status


def as_rank() -> dict[str, str]:
    """The variables that ``torchrun`` sets, if SLURM has started this process as one of several tasks of a job."""
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm" or int(os.environ.get("SLURM_NTASKS", "1")) == 1:
        return {}
    from submitit.helpers import TorchDistributedEnvironment

    found = TorchDistributedEnvironment()
    return {
        "MASTER_ADDR": found.master_addr,
        "MASTER_PORT": str(found.master_port),
        "RANK": str(found.rank),
        "WORLD_SIZE": str(found.world_size),
        "LOCAL_RANK": str(found.local_rank),
    }


def end_with_parent() -> None:
    """Have the kernel send this process a SIGTERM when its parent, the launcher or a scheduler's process, ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _prepare_process() -> None:
    """Let a job's process end with its parent, and ignore the signal by which SLURM announces a time limit.

    The signal is meant for submitit, but SLURM sends it to all processes of a job.
    """
    end_with_parent()
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
