"""Campaign of sweeps on a real SLURM and a real Ray (scripts/reliability/one_node.py), in normal use and with faults.

    python -m scripts.reliability.clusters FOLDER [NAME...]

Prints a row of results/reliability.md for each situation. Exit status 1: a situation did not end as expected.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from scripts.reliability import one_node
from scripts.reliability.campaign import campaign
from scripts.reliability.runs import ROOT, SMALL, differences, output, start

SLURM = ["hydra/launcher=slurm_cpu", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=1.5"]
RAY = ["hydra/launcher=ray_cpu", "hydra.launcher.ray.remote.num_cpus=1"]
LONG = 24  # epochs, which take more than half a minute
# SLURM may send its signal up to a minute early, so a job stays on a node for 90 to 150 seconds.
LIMITS = ["hydra.launcher.timeout_min=3", "hydra.launcher.signal_delay_s=30"]


class Wrong(Exception):  # noqa: N818
    """A situation did not end as expected."""


class Sweep:
    """A running sweep command in its own folder."""

    begun: ClassVar[list[Sweep]] = []

    def __init__(self, folder: Path, *overrides: str, **environment: str) -> None:
        self.folder = folder
        self.overrides = [
            "--multirun",
            *SMALL,
            "tracking=jsonl",
            f"data.cache_dir={folder.parent / 'cache'}",
            *overrides,
        ]
        self.environment = environment
        self.begin()
        self.begun.append(self)

    def begin(self) -> None:
        """Start the command, whether for the first time or again."""
        self.process = start(self.folder, self.overrides, **self.environment)

    def said(self) -> str:
        return output(self.folder)

    def until(self, pattern: str, count: int = 1, seconds: float = 240) -> list[str]:
        """Wait until the output has ``count`` matches of a pattern; return all matches."""
        return self.see(
            lambda: (found := re.findall(pattern, self.said())) and len(found) >= count and found, pattern, seconds
        )

    def until_steps(self, k: int, steps: int = 7) -> None:
        """Wait until the job with this k has logged ``steps`` steps."""
        self.see(lambda: self.steps(k) >= steps, f"k={k} to train", 240)

    def steps(self, k: int) -> int:
        """The number of steps that the job with this k has logged."""
        found = self.folder.glob(f"multirun/kmclr-k{k}-*/metrics.jsonl")
        return sum(each.read_bytes().count(b"train/loss") for each in found)

    def see(self, condition: Callable[[], object], what: str, seconds: float) -> list[str]:
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            if time.monotonic() > deadline or (self.process.poll() is not None and not condition()):
                raise Wrong(f"no {what}: {self.said()[-500:]}")
            time.sleep(0.1)
        return found  # type: ignore[return-value]

    def ends(self, status: int, seconds: float = 300) -> str:
        """Wait for the command to end, check its exit status, and return its output."""
        try:
            ended = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise Wrong(f"it does not end: {self.said()[-500:]}") from None
        if ended != status:
            raise Wrong(f"status {ended}, not {status}: {self.said()[-500:]}")
        if "Traceback" in self.said():
            raise Wrong("it ends in a traceback")
        return self.said()

    def states(self) -> dict[int, str]:
        """The status of each run, by its k."""
        records = [json.loads(path.read_text()) for path in self.folder.glob("multirun/kmclr-*/run.json")]
        return {int(record["params"]["k"]): record["status"] for record in records}

    def logs(self) -> dict[int, str]:
        """The output of each job, by its k."""
        paths = self.folder.glob("multirun/sweep-*/jobs/*.log")
        return {int(path.name.split("-")[1][1:]): path.read_text() for path in paths}


class JobOfRay(Sweep):
    """A sweep command that runs as a Ray job; ``process`` is the one that submits it."""

    def begin(self) -> None:
        self.folder.mkdir(parents=True)
        line = " ".join(f"'{each}'" for each in self.overrides)
        inside = f"cd {self.folder} && PYTHONPATH={ROOT} {sys.executable} -m src.train {line}"
        address = f"http://127.0.0.1:{one_node.PORTS['dashboard']}"
        tool = str(Path(sys.executable).with_name("ray"))
        submit = [tool, "job", "submit", f"--address={address}", "--", "bash", "-c", inside]
        with (self.folder / "output.txt").open("wb") as said:
            self.process = subprocess.Popen(submit, stdout=said, stderr=said)


def expect(condition: object, what: object) -> None:
    if not condition:
        raise Wrong(str(what))


def processes_of(k: int) -> list[tuple[int, int]]:
    """The process ids of a job, one for each rank, with the ids of their parents, which belong to the scheduler."""
    sweep = Sweep.begun[-1]  # its folder tells its jobs from those of another sweep with the same k
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    lines = [line.split(None, 2) for line in listed.splitlines()]
    return [
        (int(pid), int(ppid))
        for pid, ppid, line in lines
        if all(each in line for each in (f" k={k} ", "src.train", "tracking.parent", f"={sweep.folder.parent}/"))
    ]


def hold_until_the_limit(*sizes: int) -> None:
    """Suspend the jobs of these k, so that none ends before its time limit; SLURM resumes them to signal them."""
    for k in sizes:
        for pid, _ in processes_of(k):
            os.kill(pid, signal.SIGSTOP)


def worker_of(k: int) -> int:
    """The id of the scheduler's process that runs a job's command."""
    ((_, parent),) = processes_of(k)
    return parent


def two_that_train(folder: Path, *engine: str) -> Sweep:
    """Start a sweep of two long jobs, and wait until both train."""
    sweep = Sweep(folder, "method=kmclr", "k=10,20", f"epochs={LONG}", *engine)
    sweep.until_steps(10)
    sweep.until_steps(20)
    return sweep


def good(folder: Path, engine: list[str]) -> str:
    sweep = Sweep(folder, "method=kmclr", "k=10,20,30", "epochs=6", *engine)
    sweep.until("runs", 2)
    both = sweep.said().count("finished after") == 0
    sweep.ends(0)
    expect(both and sweep.states() == dict.fromkeys((10, 20, 30), "FINISHED"), sweep.states())
    expect(re.findall(r"submitted to \w+ as \w+: .*k=10 .*/jobs/.*\.log\)", sweep.said()), "no id or no log")
    return "three jobs on two cores, two at once without `jobs=`: all finished, status 0, ids and logs printed"


def killed_worker(folder: Path, engine: list[str]) -> str:
    sweep = two_that_train(folder, *engine)
    os.kill(worker_of(10), signal.SIGKILL)
    said = sweep.ends(1)
    expect(sweep.states()[20] == "FINISHED", sweep.states())
    (line,) = re.findall(r"no result: kmclr-k10-.*", said)
    sweep.begin()
    sweep.ends(0)
    expect(sweep.states() == {10: "FINISHED", 20: "FINISHED"}, sweep.states())
    expect("continued at step" in sweep.logs()[10], "it began anew")
    return f'the other job finished; status 1, one line: "{line.split(": ", 2)[2]}"; the same command continued it'


def typed_again(folder: Path, engine: list[str], number: int) -> str:
    sweep = two_that_train(folder, *engine)
    sweep.process.send_signal(number)
    sweep.process.wait(60)
    sweep.begin()
    said = sweep.ends(0)
    expect(said.count("is submitted to") == 2, "submitted twice")
    expect(said.count("already, as") == 2, "not found again")
    expect(
        all(log.count("started at step") == 1 and "continued" not in log for log in sweep.logs().values()), "stopped"
    )
    name = signal.Signals(number).name
    return f"{name}, and typed again: both jobs went on, were found by their ids and waited for, none twice"


def cancelled(folder: Path, engine: list[str]) -> str:
    tools = folder / "tools"
    tools.mkdir(parents=True)
    (tools / "sacct").write_text("#!/bin/sh\necho 'sacct: error: no accounting' >&2; exit 1\n")
    (tools / "sacct").chmod(0o755)
    sweep = Sweep(folder, "method=kmclr", "k=10,20,30", f"epochs={LONG}", *engine, PATH=f"{tools}:{os.environ['PATH']}")
    job_id = sweep.until(r"as (\d+_2):")[0]
    sweep.until_steps(10)
    subprocess.run(["scancel", job_id], check=True)
    began = time.monotonic()
    sweep.until(r"failed: it ended without a result")
    seconds = time.monotonic() - began
    said = sweep.ends(1)
    expect({10: "FINISHED", 20: "FINISHED"}.items() <= sweep.states().items(), sweep.states())
    (line,) = re.findall(r"no result: kmclr-k30-.*", said)
    return f'reported after {seconds:.0f} s, "{line.split(": ", 2)[2]}", while sacct failed; the others finished'


def refused(folder: Path, engine: list[str]) -> str:
    lines = []
    for name, override in {
        "gres": "hydra.launcher.gpus_per_node=1",
        "cores": "hydra.launcher.cpus_per_task=64",
    }.items():
        sweep = Sweep(folder / name, "method=kmclr", "k=10,20", "epochs=1", *engine, override)
        said = sweep.process.wait(120), sweep.said()
        errors = re.findall("(?:error|no result): .*", said[1])
        expect(said[0] in (1, 2) and "Traceback" not in said[1] and errors, said)
        lines.append(f'status {said[0]}, "{errors[0]}"')
    sweep = Sweep(folder / "short", "method=kmclr", "k=10,20", "epochs=1", *engine, "hydra.launcher.partition=short")
    said_last = sweep.ends(1, 60)
    lines.append("a time limit beyond the partition's: " + re.findall("SLURM can never start it.*", said_last)[0])
    expect(not _queue(), "something is left in the queue")
    return "; ".join(lines)


def time_limit(folder: Path, engine: list[str]) -> str:
    sweep = two_that_train(folder, *engine, *LIMITS)
    hold_until_the_limit(10, 20)
    sweep.ends(0, 600)
    expect(sweep.states() == {10: "FINISHED", 20: "FINISHED"}, sweep.states())
    times = [log.count("continued at step") for log in sweep.logs().values()]
    expect(min(times) > 0, f"continued {times}")
    return f"two jobs of three minutes a stay, put back into the queue {times[0]} and {times[1]} times, finished"


def ranks(folder: Path, engine: list[str]) -> str:
    """Kill a rank of a run of two tasks, later let it reach its time limit; it must equal torchrun's unbroken run."""
    run = ["method=kmclr", "k=10", f"epochs={LONG}"]
    sweep, said = killed_rank(folder, run, *engine, "hydra.launcher.tasks_per_node=2", *LIMITS)
    sweep.until_steps(10, sweep.steps(10) + 3)
    hold_until_the_limit(10)
    sweep.ends(0, 600)
    (log,) = sweep.logs().values()
    times = log.count("continued at step")
    expect(times > 1, f"continued {times} times")
    expect(not (found := unlike_torchrun(sweep, run, ["--nproc-per-node=2"])), found)
    return (
        f"{said}, at the time limit both stopped at one step and the job went back to the queue; {times} continuations "
        "to the end, which is equal to that of torchrun's two ranks, unbroken, bit for bit"
    )


def nodes(folder: Path, engine: list[str]) -> str:
    """Kill a rank of a run on two nodes; the run must end equal to an unbroken one by two agents of torchrun."""
    run = ["method=kmclr", "k=10", "epochs=9"]
    sweep, said = killed_rank(folder, run, *engine, "hydra.launcher.nodes=2", "hydra.launcher.partition=both")
    sweep.ends(0)
    meet = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={one_node.PORTS['agents']}"]
    expect(not (found := unlike_torchrun(sweep, run, *([*meet, f"--node-rank={each}"] for each in (0, 1)))), found)
    return f"{said}, to the end; equal to two agents of torchrun with a rank each, unbroken, bit for bit"


def killed_rank(folder: Path, run: list[str], *engine: str) -> tuple[Sweep, str]:
    """Kill one of a run's two ranks, start the command again; return the sweep, and a sentence on what it printed."""
    sweep = Sweep(folder / "slurm", *run, *engine)
    sweep.until_steps(10)
    (other,) = [pid for pid, _ in processes_of(10) if b"RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(other, signal.SIGKILL)
    began = time.monotonic()
    said = sweep.ends(1)
    seconds = time.monotonic() - began
    (line,) = re.findall(r"no result: kmclr-k10-.*", said)
    sweep.begin()
    return sweep, f'one killed with -9: after {seconds:.0f} s "{line.split(": ", 2)[2]}"; the same command continued it'


def unlike_torchrun(sweep: Sweep, run: list[str], *agents: list[str]) -> list[str]:
    """List where the only run of a sweep differs from an unbroken run by agents of torchrun."""
    folder = sweep.folder.parent
    alone = [*SMALL, "tracking=jsonl", f"data.cache_dir={folder / 'cache'}", "output_dir=run", *run]
    processes = [
        start(folder / "torchrun", [*each, "-m", "src.train", *alone], "torch.distributed.run") for each in agents
    ]
    for each in processes:
        expect(each.wait(600) == 0, output(folder / "torchrun")[-500:])
    (mine,) = sweep.folder.glob("multirun/kmclr-k10-*")
    return differences(mine, folder / "torchrun" / "run")


def unnoted(folder: Path, engine: list[str]) -> str:
    """Kill the command right after sbatch has submitted jobs, and later once more, with the noted job ids removed."""
    tools = folder / "tools"
    tools.mkdir(parents=True)
    (tools / "sbatch").write_text(f'#!/bin/sh\n{shutil.which("sbatch")} "$@"; kill -9 $PPID\n')
    (tools / "sbatch").chmod(0o755)
    changed = {"PATH": f"{tools}:{os.environ['PATH']}"}
    sweep = Sweep(folder, "method=kmclr", "k=10,20", f"epochs={LONG}", *engine, **changed)
    sweep.process.wait(120)
    sweep.environment = {}
    sweep.begin()
    sweep.until_steps(10)
    sweep.until_steps(20)
    sweep.process.kill()
    sweep.process.wait(60)
    for path in folder.glob("multirun/sweep-*/jobs/*.id"):
        path.unlink()
    sweep.begin()
    said = sweep.ends(0)
    expect(said.count("is submitted to") == 2, "submitted twice")
    expect(said.count("already, as") == 2, "not found again")
    expect(all(log.count("at step 0") == 1 for log in sweep.logs().values()), "two in one folder")
    expect(all("another process" not in log for log in sweep.logs().values()), "two in one folder")
    return (
        "killed at sbatch's answer: what it had submitted ended by itself, and the same command submitted anew; "
        "killed before the ids were noted: found and waited for; no two in one folder"
    )


def stopped_jobs(folder: Path, engine: list[str]) -> str:
    sweep = Sweep(folder, "method=kmclr", "k=10,20", f"epochs={LONG}", *engine, "hydra.launcher.ray.remote.num_cpus=2")
    sweep.until_steps(10)
    sweep.process.send_signal(signal.SIGINT)
    sweep.process.wait(60)
    (line,) = re.findall(r"to stop them: python (.*)", sweep.said())
    done = subprocess.run(
        [sys.executable, *line.split()],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    expect(
        "told to save and stop" in done.stdout and "had not started" in done.stdout, (done.stdout, done.stderr[-500:])
    )
    ended = time.monotonic() + 60
    while sweep.states().get(10) != "KILLED":
        expect(time.monotonic() < ended, sweep.states())
        time.sleep(1)
    time.sleep(10)  # Ray lists the job until its actor has ended
    sweep.begin()
    sweep.ends(0)
    expect(sweep.states() == {10: "FINISHED", 20: "FINISHED"}, sweep.states())
    expect("continued at step" in sweep.logs()[10], "it began anew")
    return (
        "by the line that the command had printed: one saved and stopped, the other, which waited, never started; the "
        "same command continued both"
    )


def search(folder: Path, engine: list[str]) -> str:
    rates = "optimizer.lr=tag(log,interval(0.0001,1))"  # two of the first draws are far too low, and so are pruned
    arguments = ["+sweep=optuna", "k=int(interval(5,60))", rates, "epochs=9", "hydra.sweeper.trials=8", "jobs=2"]
    began = time.monotonic()
    sweep = Sweep(folder, *arguments, *engine)
    said = sweep.ends(0, 900)
    seconds = time.monotonic() - began
    (study,) = sweep.folder.glob("multirun/sweep-*/study.db")
    with sqlite3.connect(study) as tables:
        trials = tables.execute(
            "select state, julianday(datetime_start), julianday(datetime_complete) from trials"
        ).fetchall()
    expect(len(trials) == 8 and {state for state, *_ in trials} == {"COMPLETE", "PRUNED"}, trials)
    starts, ends = sorted(row[1] for row in trials)[2:], sorted(row[2] for row in trials)
    idle = max(86400 * (begin - end) for begin, end in zip(starts, ends, strict=False))
    pruned = sum(state == "PRUNED" for state, *_ in trials)
    expect("best: val/knn_top1" in said and idle < 5, f"{idle:.1f} s, {said[-300:]}")
    return (
        f"8 trials, two at a time, in {seconds:.0f} s; each was proposed {max(idle, 0):.1f} s after another ended, "
        f"or sooner; {pruned} pruned"
    )


def no_gpu(folder: Path) -> str:
    sweep = Sweep(folder, "method=kmclr", "k=10,20", "epochs=1", "hydra/launcher=ray")
    said = sweep.ends(2, 60)
    (line,) = re.findall("error: .*", said)
    expect(not list(folder.glob("multirun/*")), "it has written something")
    return f'status 2, nothing written, "{line}"'


def job_submit(folder: Path, engine: list[str]) -> str:
    sweep = JobOfRay(folder, "method=kmclr", "k=10,20", "epochs=6", *engine)
    sweep.until_steps(10, 1)
    sweep.process.kill()
    sweep.process.wait()
    ended = time.monotonic() + 300
    while not list(folder.glob("multirun/sweep-*/results.html")):
        expect(time.monotonic() < ended, sweep.states())
        time.sleep(1)
    expect(sweep.states() == {10: "FINISHED", 20: "FINISHED"}, sweep.states())
    return "what submits it was killed: the sweep went on as a job of Ray's, and finished with its table"


def page(folder: Path, engine: str) -> str:
    """Run the commands of docs/clusters.md for this engine unchanged, in a folder that looks like the project's."""
    folder.mkdir(parents=True)
    for name in ("src", "conf"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(sys.prefix)
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    address = f"http://127.0.0.1:{one_node.PORTS['dashboard']}"
    text = (ROOT / "docs" / "clusters.md").read_text()
    lines = re.findall(rf"^    (.*experiment=demo.* hydra/launcher={engine}.*)$", text, re.MULTILINE)
    for line in lines:
        done = subprocess.run(
            ["bash", "-c", line.replace("--no-wait ", "")],  # so that the command waits for its end
            cwd=folder,
            env=os.environ | {"PATH": tools, "RAY_API_SERVER_ADDRESS": address},
            capture_output=True,
            text=True,
            timeout=600,
        )
        expect(done.returncode == 0 and "jobs finished" in done.stdout, (line, done.stdout[-500:], done.stderr[-500:]))
    expect(lines, "no lines")
    return f"{len(lines)} lines, typed as they stand: all finished, status 0"


def _queue() -> str:
    return subprocess.run(["squeue", "--noheader"], capture_output=True, text=True, check=True).stdout


SITUATIONS: dict[str, tuple[str, str, Callable[[Path], str]]] = {
    "slurm-good": ("SLURM", "a sweep", lambda folder: good(folder, SLURM)),
    "slurm-limit": ("SLURM", "the time limit", lambda folder: time_limit(folder, SLURM)),
    "slurm-search": ("SLURM", "`+sweep=optuna`", lambda folder: search(folder, SLURM)),
    "slurm-killed": ("SLURM", "a job's worker killed with -9", lambda folder: killed_worker(folder, SLURM)),
    "slurm-cancelled": ("SLURM", "scancel of a task that waits", lambda folder: cancelled(folder, SLURM)),
    "slurm-again": ("SLURM", "the command killed with -9", lambda folder: typed_again(folder, SLURM, signal.SIGKILL)),
    "slurm-unnoted": (
        "SLURM",
        "the command killed between sbatch and its notes",
        lambda folder: unnoted(folder, SLURM),
    ),
    "slurm-ranks": ("SLURM", "one run of two tasks", lambda folder: ranks(folder, SLURM)),
    "slurm-nodes": ("SLURM", "one run on two nodes", lambda folder: nodes(folder, SLURM)),
    "slurm-refused": ("SLURM", "what cannot be had", lambda folder: refused(folder, SLURM)),
    "slurm-page": ("SLURM", "the lines of docs/clusters.md", lambda folder: page(folder, "slurm")),
    "ray-good": ("Ray", "a sweep", lambda folder: good(folder, RAY)),
    "ray-search": ("Ray", "`+sweep=optuna`", lambda folder: search(folder, RAY)),
    "ray-killed": ("Ray", "a job's worker killed with -9", lambda folder: killed_worker(folder, RAY)),
    "ray-again": ("Ray", "the command stopped", lambda folder: typed_again(folder, RAY, signal.SIGTERM)),
    "ray-stopped": ("Ray", "jobs told to stop", lambda folder: stopped_jobs(folder, RAY)),
    "ray-no-gpu": ("Ray", "no node has a GPU", lambda folder: no_gpu(folder)),
    "ray-submit": ("Ray", "`ray job submit`", lambda folder: job_submit(folder, RAY)),
    "ray-page": ("Ray", "the lines of docs/clusters.md", lambda folder: page(folder, "ray")),
}


@contextmanager
def engine(name: str, folder: Path) -> Iterator[None]:
    """Run the scheduler, and set the environment variables by which its tools find it."""
    with one_node.slurm(folder / "slurm") if name == "SLURM" else one_node.ray() as found:
        before = dict(os.environ)
        os.environ.update(found, OMP_NUM_THREADS="1")
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def main(folder: Path, names: list[str]) -> list[str]:
    """Run the situations; return those that did not end as expected."""
    wrong = []
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # an orderly exit stops the daemons
    for each in ("SLURM", "Ray"):
        chosen = [name for name in SITUATIONS if SITUATIONS[name][0] == each and name in names]
        if not chosen:
            continue
        with engine(each, folder):
            for name in chosen:
                _, what, run = SITUATIONS[name]
                began = time.monotonic()
                try:
                    came = run(folder / name)
                except Exception as error:  # go on with the other situations
                    came = f"WRONG: {' '.join(str(error).split())}"
                    wrong.append(name)
                finally:
                    for sweep in Sweep.begun:
                        sweep.process.kill()
                print(f"| {each} | {what} | {came} |", flush=True)
                print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return wrong


if __name__ == "__main__":
    campaign(__doc__, main, names=SITUATIONS)
