"""What runs on the machine that a cluster gave to a job: the job's command, its log, and a note of how it ended.

Little is imported here, because a scheduler's process loads it beside every job.
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
    """A job, as it is handed to a cluster. submitit calls it, and calls `checkpoint` ahead of a time limit.

    Of a job of several tasks each calls it, and starts a rank of the run. Ahead of a time limit only the first is told
    to stop, and the ranks stop together (`src.training.distributed.Ranks.max_status`).
    """

    command: Sequence[str]
    folder: Path  # to run it in
    log: Path  # gets its output, after that of earlier attempts
    note: Path  # gets its exit status; not there before the end
    environment: Mapping[str, str]  # for what the machine does not set by itself

    def __call__(self) -> int:
        """Run it to its end, or until submitit's handler of signals puts it back into the queue and exits."""
        self.start()
        try:
            return self.wait()
        except Exception:  # submitit's, where it has been put back too often: the job has saved, and can continue
            write_whole(self.note, str(TIME_IS_UP).encode())
            raise

    def checkpoint(self) -> Any:
        """Stop the job, which saves; the same work, for submitit to queue again."""
        from submitit.helpers import DelayedSubmission

        self.stop(signal.SIGUSR1)
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(replace(self))

    def start(self) -> None:
        """Start the process."""
        rank = as_rank()
        self.first = rank.get("RANK", "0") == "0"  # all ranks of a run end alike, so one of them notes how
        if self.first:
            self.note.unlink(missing_ok=True)
        cores = os.environ.get("SLURM_CPUS_PER_TASK")
        environment = {**self.environment, **os.environ, **rank}
        # The scheduler may have handed on the sweep's own, which cli.py sets.
        environment["HYDRA_FULL_ERROR"] = self.environment.get("HYDRA_FULL_ERROR", "0")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment | ({"OMP_NUM_THREADS": cores} if cores else {}),
                preexec_fn=_behind_the_scheduler,
            )

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Tell the process to save and stop."""
        self.process.send_signal(number)

    def wait(self) -> int:
        """Wait for the process, and note its exit status, which is returned."""
        # Popen.wait holds a lock that a signal's handler, which waits as well, would never get.
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        status = self.process.wait()
        if self.first:
            write_whole(self.note, str(status).encode())
        return status


def as_rank() -> dict[str, str]:
    """The variables of ``torchrun``, where SLURM has started this process as one of several tasks of a job."""
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
    """Have the kernel stop this process, as SIGTERM would, when its parent is gone: no job outlives its sweep."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _behind_the_scheduler() -> None:
    """SLURM sends what is meant for submitit, ahead of a time limit, to all processes of a job."""
    end_with_parent()
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
