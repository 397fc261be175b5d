"""``hydra/launcher=slurm``: each job of a sweep is a job of SLURM; submitit submits several of them as an array.

A job of several tasks is one run on several devices: each task is a rank of the run (`src.sweeps.worker.as_rank`).
"""

from __future__ import annotations

import io
import re
import subprocess
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from src.errors import UsageError
from src.sweeps.cluster import ClusterLauncher, JobState, SchedulerSilent
from src.sweeps.worker import Work

# Source: the man pages of sbatch and squeue, "JOB STATE CODES" and "JOB REASON CODES".
ENDED_STATES = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}
NEVER_STARTS = re.compile(
    "AccountNotAllowed|BadConstraints|DependencyNeverSatisfied|InvalidAccount|InvalidQOS|PartitionConfig"
    "|PartitionTimeLimit|QOSNotAllowed|.*PerJob(Limit)?"
)
ARRAY = 1000  # jobs in an array at most; a cluster's MaxArraySize is 1,001 by default
ASK_LESS = "hydra.launcher.* asks for what this cluster does not give"


class SlurmLauncher(ClusterLauncher):
    """Submits jobs to SLURM.

    Two minutes (``signal_delay_s``) before its time limit a job saves, and submitit puts it back into the queue.

    Args:
        jobs: how many of an array run at once; None: all of them.
        max_num_timeout: how often a job goes back to the queue at its time limit.
        sbatch: the other settings of submitit's executor. A setting that is None is left to the cluster; without
            ``tasks_per_node``, a node has a task for each of its GPUs, or one.
    """

    engine, package, extra = "SLURM", "submitit", "slurm"
    at_a_time = None  # SLURM limits the running jobs of an array, even after this command has ended

    def __init__(self, jobs: int | None, max_num_timeout: int, **sbatch: Any) -> None:
        self.jobs, self.max_num_timeout = jobs, max_num_timeout
        self.sbatch = {key: value for key, value in sbatch.items() if value is not None}

    def submit(self, work: Mapping[str, Work]) -> Sequence[str]:
        """Submit one job, or arrays of jobs; if an array is refused, cancel those before it.

        Raises:
            UsageError: SLURM refuses a job, there is no SLURM here, or submitit does not have a setting.
        """
        from submitit import SlurmExecutor
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        settings = {
            key: OmegaConf.to_object(each) if OmegaConf.is_config(each) else each for key, each in self.sbatch.items()
        }
        gpus = re.search(r"\d+$", str(settings.get("gpus_per_node", "")))  # the number in "8" or "a100:8"
        settings.setdefault("tasks_per_node", int(gpus[0]) if gpus else 1)
        if "cpus_per_task" in settings:  # since SLURM 22.05, srun does not inherit it from sbatch
            settings["srun_args"] = [f"--cpus-per-task={settings['cpus_per_task']}"]
        ids: list[str] = []
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # private: its files have the jobs' environment
            executor = SlurmExecutor(self._folder, self.max_num_timeout)
            executor.update_parameters(
                **executor._convert_parameters(settings),
                array_parallelism=self.jobs or len(work),
                stderr_to_stdout=True,
            )
            with redirect_stderr(io.StringIO()):  # because submitit also prints the errors that it raises
                for first in range(0, len(work), ARRAY):
                    part = executor.submit_array(list(work.values())[first : first + ARRAY])
                    ids += [each.job_id for each in part]
        except (FailedJobError, FailedSubmissionError, OSError) as error:
            for array in _arrays(ids):
                self.cancel(array)
            raise UsageError(f"hydra/launcher=slurm: {_complaint(str(error))}; {ASK_LESS}") from None
        except (RuntimeError, ValueError) as error:  # there is no srun here, or submitit does not have a setting
            raise UsageError(f"hydra/launcher=slurm: {' '.join(str(error).splitlines()[:1])}") from None
        return ids

    @property
    def _folder(self) -> Path:
        return self.sweep.directory / "jobs" / "slurm"

    def unrecorded(self, logs: Collection[Path]) -> Mapping[Path, str]:
        """Find the ids in the names of submitit's files: ``ID_submitted.pkl`` holds the work of the job ``ID``.

        A job without this file was submitted just before the command was killed, and ends without having started.
        """
        from submitit.core.utils import DelayedSubmission

        ending = "_submitted.pkl"
        written = sorted(self._folder.glob(f"*{ending}") if logs else [], key=lambda path: path.stat().st_mtime)
        return {DelayedSubmission.load(path).function.log: path.name.removesuffix(ending) for path in written}

    def job_states(self, ids: Collection[str]) -> Mapping[str, JobState]:
        """Ask squeue and, about the jobs that it has forgotten, sacct if there is one."""
        listed = _ask("squeue", "--me", "--array", "--states=all", "--noheader", "--format=%i|%T|%r|%N")
        found = {}
        for line in listed.splitlines():
            job_id, state, reason, nodes = line.split("|", 3)
            if job_id in ids:
                found[job_id] = _job_state(state, reason, nodes)
        if forgotten := set(ids) - found.keys():
            try:
                listed = _ask(
                    "sacct",
                    "--allocations",
                    "--noheader",
                    "--parsable2",
                    "--format=JobID,State",
                    f"--jobs={','.join(_arrays(sorted(forgotten)))}",
                )
            except SchedulerSilent:
                listed = ""
            for line in listed.splitlines():
                job_id, state = line.split("|", 1)
                if job_id in forgotten:
                    found[job_id] = _job_state(state, "", "")
        return found

    def cancel(self, job_id: str) -> None:
        """Cancel a job or an array with scancel; a failure is ignored."""
        with suppress(SchedulerSilent):
            _ask("scancel", job_id)

    def how_to_stop(self, ids: Sequence[str]) -> str:
        """The scancel command, which sends a SIGTERM, on which a job saves."""
        return f"scancel {' '.join(_arrays(ids))}"


def _arrays(ids: Iterable[str]) -> list[str]:
    """The ids of the jobs' arrays, each once; for a job outside an array, the job's own id."""
    return list(dict.fromkeys(each.split("_")[0] for each in ids))


def _job_state(state: str, reason: str, nodes: str) -> JobState:
    state, _, more = state.partition(" ")  # sacct's "CANCELLED by 1000"
    if state in ENDED_STATES:
        return JobState("is gone", f"{state} {more}".strip())
    if state == "PENDING" and NEVER_STARTS.fullmatch(reason):
        return JobState("cannot start", f"{reason}, {ASK_LESS}")
    if state == "PENDING":
        return JobState("waits", "" if reason in ("None", "Priority") else reason)
    return JobState("runs", f"on {nodes}" if nodes and state == "RUNNING" else state)


def _ask(*command: str) -> str:
    """Run a tool of SLURM and return its output.

    Raises:
        SchedulerSilent: the tool fails, hangs, or does not exist.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SchedulerSilent(f"{command[0]} does not answer ({error})") from None
    if done.returncode:
        raise SchedulerSilent(f"{command[0]} does not answer ({_complaint(done.stderr)})")
    return done.stdout


def _complaint(said: str) -> str:
    """The error message of a SLURM tool on one line, without the tool's name before each of its lines."""
    lines = [re.sub(r"^\w+: (error: )?", "", line).strip() for line in said.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line)) or "no reason given"
