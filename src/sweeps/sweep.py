"""The folder of a sweep, ``multirun/sweep-NAME-HASH``, and its run in MLflow, under which the jobs are nested.

However a sweep ends, one table and one plot show its results so far, and a line says how to get the missing ones.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from hydra.core.override_parser.types import Quote, QuotedString

from src.config import schema
from src.errors import UsageError
from src.reporting import mlflow_charts, table
from src.reporting.rows import TableRow, summarise
from src.runs import directory as run_directory
from src.runs import mlflow_store
from src.runs.delivery import attach_children
from src.runs.links import how_to_open
from src.runs.record import TAG_CHARTS, TAG_NOTE, TAG_SWEEP_ID, Record
from src.runs.tracker import Status, Tracker, mark_failed
from src.sweeps.jobs import Job
from src.system import environment
from src.system.redact import redact
from src.system.stopping import PRUNED, ignored, is_stop


class Sweep:
    """A sweep in progress: its folder, its run in MLflow, and the summary of its jobs, however it ends.

    A search sets ``best`` to the value and the point of its best trial, in words.

    Args:
        name: a name for people, which is a part of the folder's name.
        identity: texts that are equal whenever the same sweep is run again; its id is a hash of them.
        jobs: all jobs, also those that are finished or not legal; a search adds to them.
        tracking: where to log.
    """

    def __init__(self, name: str, identity: Sequence[str], jobs: list[Job], tracking: schema.Tracking) -> None:
        self.name, self.jobs, self.tracking = name, jobs, tracking
        self.id = hashlib.sha256(" ".join([tracking.experiment, *identity]).encode()).hexdigest()[:8]
        self.directory = run_directory.ROOT / f"sweep-{name}-{self.id}"
        self.status, self.best = 1, ""
        self.repeats = True  # whether the same command has the same jobs

    def overrides(self, job: Job) -> list[str]:
        """The overrides by which a job learns of its sweep and, in a search, of its trial."""
        trial = [] if job.trial is None else [f"tracking.trial={job.trial}"]
        folder = str(self.directory)
        if not re.fullmatch(r"[\w./-]+", folder, re.ASCII):  # other characters need quotes in Hydra
            folder = QuotedString(folder, Quote.single).with_quotes()
        return [f"tracking.parent={folder}", *trial]

    def __enter__(self) -> Sweep:
        if self.tracking.name == "mlflow":
            mlflow_store.check(self.tracking.experiment)  # once, before any job does it
        tags = {TAG_SWEEP_ID: self.id, "command": _command()}
        with ExitStack() as stack:
            stack.enter_context(run_directory.exclusive(self.directory, run_directory.LOCK_TIMEOUT_S))
            for number in {signal.SIGTERM, signal.SIGHUP} - ignored():
                stack.callback(signal.signal, number, signal.signal(number, _exit))  # so that the sweep is closed
            self.tracker = Tracker(self.directory, self.tracking, {"sweep": self.name}, tags)
            self.held = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        stopped = kind is not None and not issubclass(kind, Exception)
        status: Status = "KILLED" if stopped else "FAILED"
        try:
            refused = kind is not None and issubclass(kind, UsageError) and not any(job.record for job in self.jobs)
            # If nothing has run because of a mistake in the command, the message about it is enough.
            outcome: Status = "FAILED" if refused else self._conclude()
            status = outcome if kind is None else status
        finally:
            self.tracker.close(status)
            self.held.__exit__(*sys.exc_info())  # turns an error of the disk into a line for people

    def _conclude(self) -> Status:
        """Summarise the sweep in the terminal, its folder and MLflow; set its exit status and return its state."""
        finished = [job for job in self.jobs if job.is_finished]
        pruned = [job for job in self.jobs if job.status == PRUNED and job not in finished]
        lacking = [job for job in self.jobs if job not in finished and job not in pruned]
        for job in self.jobs:
            if job.record and job.record.status == "RUNNING":
                # The lock is held if a cluster's queue has started the job again.
                with suppress(UsageError), run_directory.exclusive(job.directory):
                    mark_failed(job.directory, job.error or "its process is gone")
        attach_children(self.tracker, [job.directory for job in self.jobs if job.record])

        # A job need not be named where the message about it does so, or names the setting that is not legal.
        why = [(job.label if job.cfg else "", job.reason) for job in lacking]
        notes = [f"no result: {reason if label in reason else f'{label}: {reason}'}" for label, reason in why]
        notes += [f"pruned: {job.label}" for job in pruned]
        rows, more = summarise([Record.load(job.directory) for job in finished])
        paths = self._tabulate(rows, notes, more) if rows else []
        if self.best:
            print(f"best: {self.best}", flush=True)
        stopped = [job.status for job in lacking if is_stop(job.status)]
        counts = {"sweep/finished": len(finished), "sweep/stopped": len(stopped)}
        counts |= {"sweep/failed": len(lacking) - len(stopped), "sweep/pruned": len(pruned)}
        # At a new step, so that the counts of earlier commands stay in the log.
        self.tracker.log(counts | table.summary(rows), max(len(finished), self.tracker.next_step))
        mlflow_charts.publish(self.tracker)

        print(f"{self.directory}: {len(finished)} of {len(self.jobs)} jobs finished, {len(pruned)} pruned", flush=True)
        print(f"report: python -m src.report sweep={self.id} tracking={self.tracking.name}", flush=True)
        for path in paths:
            if path.suffix == ".png":
                print(f"plot: {path}", flush=True)
        if rows:
            print(f"page: {self.directory / 'results.html'}", flush=True)
        if charts_path := self.tracker.record.tags.get(TAG_CHARTS):
            print(f"charts: {how_to_open(charts_path)}", flush=True)
        for note in notes:
            print(note, file=sys.stderr)
        # A job that was refused (status 2) would be refused again; the message about it says what to do instead.
        possible = [job.cfg for job in lacking if job.cfg and job.status != 2 and not job.is_hopeless]
        if possible and self.repeats and not any(cfg.resume == "never" for cfg in possible):
            print(f"run again just what is missing: {_command()}", file=sys.stderr)
        if not lacking:
            self.status = 0
            return "FINISHED"
        self.status = stopped[0] if stopped else 1
        return "KILLED" if stopped else "FAILED"

    def _tabulate(self, rows: Sequence[TableRow], notes: Sequence[str], more: Sequence[str]) -> list[Path]:
        """Show the results in the terminal and in MLflow, and write them to files, whose paths are returned.

        Args:
            rows: of the table.
            notes: about single jobs, for the files only.
            more: further notes, for the files and the terminal.
        """
        title = f"{self.name} ({self.id})"
        paths = table.write(rows, [*notes, *more], title, self.directory)
        for path in paths:
            self.tracker.artifact(path)
        table.show(rows, more, title)
        self.tracker.record.tags[TAG_NOTE] = mlflow_charts.describe_sweep(title, rows, self.best)
        return paths


def _exit(number: int, _: object) -> None:
    sys.exit(128 + number)


def _command() -> str:
    return shlex.join(["python", "-m", "src.train", *map(redact, environment.TYPED)])
