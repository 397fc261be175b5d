"""The folder of a sweep, ``multirun/sweep-NAME-HASH``, and its run in MLflow, under which the jobs are nested.

However a sweep ends, one table and one plot show what has come out, and a line says how to get the rest.
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
    """A sweep that is going on: its folder, its run in MLflow, and what remains of both however it ends.

    Args:
        name: for people.
        identity: what makes it the same sweep when it is run again.
        jobs: all of them, also those that are finished or not legal; a search adds to them.
        tracking: where to log.

    A search sets ``best``: what its best trial has found, and where.
    """

    def __init__(self, name: str, identity: Sequence[str], jobs: list[Job], tracking: schema.Tracking) -> None:
        self.name, self.jobs, self.tracking = name, jobs, tracking
        self.id = hashlib.sha256(" ".join([tracking.experiment, *identity]).encode()).hexdigest()[:8]
        self.directory = run_directory.ROOT / f"sweep-{name}-{self.id}"
        self.status, self.best = 1, ""

    def overrides(self, job: Job) -> list[str]:
        """What a job is told of the sweep."""
        trial = [] if job.trial is None else [f"tracking.trial={job.trial}"]
        folder = str(self.directory)
        if not re.fullmatch(r"[\w./-]+", folder, re.ASCII):  # all that Hydra takes without quotes
            folder = QuotedString(folder, Quote.single).with_quotes()
        return [f"tracking.parent={folder}", *trial]

    def __enter__(self) -> Sweep:
        if self.tracking.name == "mlflow":
            mlflow_store.check(self.tracking.experiment)  # once, ahead of the jobs
        tags = {TAG_SWEEP_ID: self.id, "command": _command()}
        with ExitStack() as stack:
            stack.enter_context(run_directory.exclusive(self.directory, run_directory.LOCK_TIMEOUT_S))
            for number in {signal.SIGTERM, signal.SIGHUP} - ignored():
                stack.callback(signal.signal, number, signal.signal(number, _exit))  # which closes what is open
            self.tracker = Tracker(self.directory, self.tracking, {"sweep": self.name}, tags)
            self.held = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        stopped = kind is not None and not issubclass(kind, Exception)
        status: Status = "KILLED" if stopped else "FAILED"
        try:
            refused = kind is not None and issubclass(kind, UsageError) and not any(job.record for job in self.jobs)
            # A mistake in the command says all there is to say.
            outcome: Status = "FAILED" if refused else self._conclude()
            status = outcome if kind is None else status
        finally:
            self.tracker.close(status)
            self.held.__exit__(*sys.exc_info())  # which says what a disk has refused

    def _conclude(self) -> Status:
        finished = [job for job in self.jobs if job.is_finished]
        pruned = [job for job in self.jobs if job.status == PRUNED and job not in finished]
        lacking = [job for job in self.jobs if job not in finished and job not in pruned]
        for job in self.jobs:
            if job.record and job.record.status == "RUNNING":
                # Another process still works on it where a cluster's queue has taken it up again.
                with suppress(UsageError), run_directory.exclusive(job.directory):
                    mark_failed(job.directory, job.error or "its process is gone")
        attach_children(self.tracker, [job.directory for job in self.jobs if job.record])

        # A mistake in a setting names the setting, so the job need not be named.
        notes = [f"no result: {f'{job.label}: ' if job.cfg else ''}{job.reason}" for job in lacking]
        notes += [f"pruned: {job.label}" for job in pruned]
        rows, more = summarise([Record.load(job.directory) for job in finished])
        paths = self._tabulate(rows, notes, more) if rows else []
        if self.best:
            print(f"best: {self.best}", flush=True)
        stopped = [job.status for job in lacking if is_stop(job.status)]
        counts = {"sweep/finished": len(finished), "sweep/stopped": len(stopped)}
        counts |= {"sweep/failed": len(lacking) - len(stopped), "sweep/pruned": len(pruned)}
        # What the sweep was before stays as it was logged.
        self.tracker.log(counts | (table.summary(rows) if rows else {}), max(len(finished), self.tracker.next_step))
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
        possible = [job.cfg for job in lacking if job.cfg]
        if possible and not any(cfg.resume == "never" for cfg in possible):
            print(f"run again just what is missing: {_command()}", file=sys.stderr)
        if not lacking:
            self.status = 0
            return "FINISHED"
        self.status = stopped[0] if stopped else 1
        return "KILLED" if stopped else "FAILED"

    def _tabulate(self, rows: Sequence[TableRow], notes: Sequence[str], more: Sequence[str]) -> list[Path]:
        """Show what has come out, here and in MLflow; the files. The notes on jobs are in these alone."""
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
