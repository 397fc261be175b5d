"""A sweep: many configurations under one roof, ``python -m src.train --multirun +sweep=support_size``.

Hydra composes each job; this module decides which jobs there are, leaves out those that are finished, hands the rest to
the launcher, and makes one table and one plot of what came out. In MLflow a sweep is a run with its jobs nested under
it. The truth is in the folders, ``multirun/NAME-HASH`` for each job and ``multirun/sweep-NAME-HASH`` for the sweep, so
the same command again does what is left, and nothing else.
"""

from __future__ import annotations

import hashlib
import math
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, flag_override
from omegaconf.errors import OmegaConfBaseException

from src import charts, config, report, rundir, store, tracking
from src.config import Config
from src.errors import UsageError
from src.launcher import JobFailed, LocalLauncher
from src.preview import preview
from src.record import Record
from src.redact import redact
from src.rows import summarise
from src.runs import run_in
from src.stopping import PRUNED, is_stop

if TYPE_CHECKING:
    from src.study import Study

OBJECTIVE = "val/knn_top1"  # never a figure of the test images
PLUGINS = "hydra_plugins.support_sets"

Grid = Mapping[str, Sequence[str]]  # key: its values, as on the command line


@dataclass
class Job:
    """One configuration of a sweep."""

    overrides: list[str]
    cfg: Config | None  # None: not legal
    directory: Path
    error: str = ""  # why there is no result
    status: int = 0  # the exit status it ended with, where there is an error
    trial: int | None = None  # its number in a study

    @property
    def label(self) -> str:
        """What tells it from the others, for people."""
        return self.directory.name if self.cfg else self.overrides[-1]

    @property
    def record(self) -> Record | None:
        """What its folder says of it; None before its start."""
        return Record.find(self.directory) if self.cfg else None

    @property
    def reason(self) -> str:
        """Why it has no result."""
        return self.error or (self.record.tags.get("error", "not finished") if self.record else "not started")

    @property
    def is_finished(self) -> bool:
        return self.cfg is not None and rundir.is_finished(self.directory, self.cfg)


class GridSweeper(Sweeper):
    """``hydra/sweeper=grid``: every combination of values, of each of several alternatives, each configuration once.

    A key on the command line replaces the values that the sweep gives it. One that only some alternatives have, such as
    ``k``, concerns those; ``method`` chooses among the alternatives.

    Args:
        params: what all alternatives sweep.
        union: the alternatives, each a line of overrides.
    """

    config: DictConfig
    hydra_context: HydraContext
    launcher: Launcher

    def __init__(self, params: Mapping[str, Any], union: Sequence[str] = ("",)) -> None:
        self.union = list(union)
        self.params = {key: str(value) for key, value in params.items()}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config
        self.launched = 0
        self.deadline = time.monotonic() + 60 * (config.max_minutes or math.inf)

    def sweep(self, arguments: list[str]) -> None:
        """Run what is not finished, and summarise all of it.

        Raises:
            UsageError: no job is legal, or another process runs the same sweep; nothing has been written then.
            SystemExit: with status 1 if a job failed, or that of whatever stopped the jobs.
        """
        jobs = self.jobs(arguments)
        legal = [job.cfg for job in jobs if job.cfg]
        if not legal:
            raise UsageError(jobs[0].error if jobs else "method: no alternative of this sweep has it")
        for job in jobs:
            if not job.cfg:
                print(f"not possible: {job.error} ({' '.join(job.overrides)})", file=sys.stderr, flush=True)
        if self.config.dry_run:
            print(preview(legal, self.config.jobs))
            sys.exit(2 if len(legal) < len(jobs) else 0)
        name = self.config.hydra.runtime.choices.get("sweep") or "grid"
        hashes = sorted(config.config_hash(job.cfg) for job in jobs if job.cfg)
        with self.prepare(Sweep(name, hashes, jobs, legal[0].tracking)) as sweep:
            done = sum(job.is_finished for job in jobs)
            print(f"{sweep.directory}: {len(jobs)} jobs, {done} finished already", flush=True)
            self.launch(sweep, [job for job in jobs if job.cfg and not job.is_finished])
        sys.exit(sweep.status)

    def jobs(self, arguments: list[str]) -> list[Job]:
        """Compose and check every distinct configuration."""
        given = self._grid(arguments)
        params = self._grid([f"{key}={value}" for key, value in self.params.items()])
        union = [self._grid(shlex.split(line)) for line in self.union]
        distinct: dict[str, Job] = {}
        for grid in alternatives(union, params, given, [self._methods(grid) for grid in union]):
            for values in product(*grid.values()):
                job = self.compose([f"{key}={value}" for key, value in zip(grid, values, strict=True)])
                identity = config.config_hash(job.cfg) if job.cfg else " ".join(job.overrides)
                distinct.setdefault(identity, job)
        if any(job.cfg and job.cfg.output_dir for job in distinct.values()) and len(distinct) > 1:
            raise UsageError("output_dir: each job of a sweep has a folder of its own under multirun/; leave it out")
        # One seed after the other: whatever stops a sweep, the seeds that are done make whole curves.
        return sorted(distinct.values(), key=lambda job: job.cfg.seed if job.cfg else 0)

    def _methods(self, grid: Grid) -> Sequence[str]:
        """The methods of an alternative; none where it leaves that to the command line."""
        if "experiment" not in grid or "method" in grid:
            return grid.get("method", [])
        bare = [self.compose([f"experiment={value}"]) for value in grid["experiment"]]
        return [job.cfg.method.name for job in bare if job.cfg]

    def _grid(self, overrides: list[str]) -> Grid:
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        grid: dict[str, list[str]] = {}
        for override in parser.parse_overrides(overrides):
            key = override.get_key_element()
            if not override.is_sweep_override():
                grid[key] = [override.get_value_element_as_str()]
            elif override.is_discrete_sweep():
                grid[key] = list(override.sweep_string_iterator())
            else:
                raise UsageError(f"{override.input_line}: a grid wants single values; +sweep=optuna takes intervals")
        return grid

    def compose(self, overrides: list[str]) -> Job:
        """A job with its config; one that is not legal with the reason."""
        try:
            composed = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
            with flag_override(composed, ["struct", "readonly"], False):
                del composed["hydra"]
            cfg = config.parse(composed)
        except (UsageError, HydraException, OmegaConfBaseException) as error:
            from src import cli

            reason = str(error) if isinstance(error, UsageError) else cli.explain(str(error))
            return Job(overrides, None, Path(), " ".join(reason.split()), status=2)
        return Job(overrides, cfg, rundir.choose(cfg))

    def prepare(self, sweep: Sweep) -> Sweep:
        """Make the launcher, which fails where its package is not installed, before the sweep writes anything."""
        with flag_override(self.config.hydra, ["struct", "readonly"], False):  # Hydra 1.4 locks this node by itself
            self.config.hydra.sweep.dir = str(sweep.directory)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=self.hydra_context, task_function=self.task_function, config=self.config
        )
        return sweep

    def launch(self, sweep: Sweep, pending: Sequence[Job]) -> None:
        """Hand jobs to Hydra's launcher, and note how each ended."""
        if not pending:
            return
        if self.config.max_minutes is not None:  # all jobs together, also of several launches
            with flag_override(self.config, ["struct", "readonly"], False):
                self.config.max_minutes = max(self.deadline - time.monotonic(), 0.1) / 60
        returns = self.launcher.launch(
            [[*job.overrides, *sweep.overrides(job)] for job in pending], initial_job_idx=self.launched
        )
        self.launched += len(pending)
        for job, returned in zip(pending, returns, strict=True):
            if returned.status == JobStatus.FAILED:
                error = returned._return_value  # the property prints before it raises
                job.error = " ".join(str(error).split()) or type(error).__name__
                job.status = error.status if isinstance(error, JobFailed) else 1


class StudySweeper(GridSweeper):
    """A search by Optuna (src/study.py): every job is a trial, its value the last ``val/knn_top1``.

    Args:
        trials: how many in all, with those of earlier commands.
        pruner: whether to stop hopeless trials early: ``median``, ``halving`` or ``none``.
        seed: of the search.
        params: the space. A key on the command line replaces its distribution, or fixes it.
    """

    def __init__(self, trials: int, pruner: str, seed: int, params: Mapping[str, Any]) -> None:
        super().__init__(params=params)
        self.trials, self.pruner, self.seed = trials, pruner, seed

    def sweep(self, arguments: list[str]) -> None:
        """Take up the trials that were cut off, then propose others, ``jobs`` at a time, until there are enough."""
        from src import study as studies

        if self.pruner not in studies.PRUNERS:
            raise UsageError(f"hydra.sweeper.pruner={self.pruner}: choose one of {', '.join(studies.PRUNERS)}")
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        parsed = parser.parse_overrides([*(f"{key}={value}" for key, value in self.params.items()), *arguments])
        overrides = {each.get_key_element(): each for each in parsed}
        space = studies.space(list(overrides.values()), self.config)
        fixed = [
            f"{key}={each.get_value_element_as_str()}"
            for key, each in overrides.items()
            if not each.is_sweep_override()
        ]
        base = self.compose(fixed)
        if base.cfg is None:
            raise UsageError(base.error)
        if not space:
            raise UsageError("hydra.sweeper.params: every setting is fixed; give one an interval or choices")
        if base.cfg.data.final:
            raise UsageError("data.final=true: leaves no validation images, by which a search judges its trials")

        def job(number: int) -> Job:
            assert study is not None
            point = study.points()[number]
            composed = self.compose([*fixed, *(f"{key}={value}" for key, value in point.items())])
            composed.trial = number
            composed.status = composed.status or (PRUNED if study.state(number) == "PRUNED" else 0)
            return composed

        identity = [config.config_hash(base.cfg), *sorted(f"{key}={value}" for key, value in space.items())]
        sweep = Sweep("optuna", identity, [], base.cfg.tracking)
        if self.config.dry_run:
            known = (sweep.directory / studies.FILE).exists()
            study = studies.Study(sweep.directory, space, self.pruner, self.seed) if known else None
            there = [job(number).cfg for number in study.points()] if study else []
            print(preview([cfg for cfg in there if cfg], self.config.jobs))
            print(f"{max(self.trials - len(there), 0)} trials to propose")
            return
        with self.prepare(sweep):
            study = studies.Study(sweep.directory, space, self.pruner, self.seed)
            sweep.jobs += [job(number) for number in study.points()]
            print(f"{sweep.directory}: {len(sweep.jobs)} of {self.trials} trials are there", flush=True)
            batch = [each for each in sweep.jobs if study.state(each.trial or 0) == "RUNNING"]
            while batch or len(sweep.jobs) < self.trials:
                if not batch:
                    room = min(self.config.jobs, self.trials - len(sweep.jobs))
                    batch = [job(study.propose()) for _ in range(room)]
                    sweep.jobs += batch
                self.launch(sweep, [each for each in batch if each.cfg and not each.is_finished])
                for each in batch:
                    _conclude(study, each)
                if any(is_stop(each.status) for each in batch):
                    break
                batch = []
            if best := study.best():
                print(f"best: trial {best[0]}, val/knn_top1 {best[1]:.2f}, {study.points()[best[0]]}", flush=True)
        sys.exit(sweep.status)


def _conclude(study: Study, job: Job) -> None:
    assert job.trial is not None
    if job.is_finished and job.record:
        study.conclude(job.trial, "COMPLETE", job.record.metrics[OBJECTIVE])
    elif not is_stop(job.status):  # which stays open, and the next command continues it
        study.conclude(job.trial, "PRUNED" if job.status == PRUNED else "FAIL")


class Sweep:
    """A sweep that is going on: its folder, its run in MLflow, and what remains of both however it ends.

    Args:
        name: for people.
        identity: what makes it the same sweep when it is run again.
        jobs: all of them, also those that are finished or not legal; a search adds to them.
        cfg: where to log.
    """

    def __init__(self, name: str, identity: Sequence[str], jobs: list[Job], cfg: config.Tracking) -> None:
        self.name, self.jobs, self.cfg = name, jobs, cfg
        self.id = hashlib.sha256(" ".join([cfg.experiment, *identity]).encode()).hexdigest()[:8]
        self.directory = rundir.ROOT / f"sweep-{name}-{self.id}"
        self.status = 1

    def overrides(self, job: Job) -> list[str]:
        """What a job is told of the sweep."""
        trial = [] if job.trial is None else [f"tracking.trial={job.trial}"]
        return [f"tracking.parent={self.directory}", *trial]

    def __enter__(self) -> Sweep:
        if self.cfg.name == "mlflow":
            store.check(self.cfg.experiment)  # once, ahead of the jobs
        self.lock = rundir.exclusive(self.directory)
        self.lock.__enter__()
        self.handler = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # closes what is open
        tags = {"sweep_id": self.id, "command": _command()}
        params = {"sweep": self.name}
        self.tracker = tracking.Tracker(self.directory, self.cfg, params, tags)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        stopped = kind is not None and not issubclass(kind, Exception)
        status: Literal["FINISHED", "FAILED", "KILLED"] = "KILLED" if stopped else "FAILED"
        try:
            outcome = self._conclude()
            status = outcome if kind is None else status
        finally:
            self.tracker.close(status)
            self.lock.__exit__(None, None, None)
            signal.signal(signal.SIGTERM, self.handler)

    def _conclude(self) -> Literal["FINISHED", "FAILED", "KILLED"]:
        finished = [job for job in self.jobs if job.is_finished]
        pruned = [job for job in self.jobs if job.status == PRUNED]
        lacking = [job for job in self.jobs if job not in finished and job not in pruned]
        for job in self.jobs:
            if job.record and job.record.status == "RUNNING":
                with suppress(UsageError), rundir.exclusive(job.directory):  # refused where a cluster still works on it
                    tracking.abandon(job.directory, job.error or "its process is gone")
        children = [job.directory for job in self.jobs if job.record]
        tracking.nest(self.tracker, children)
        charts_path = tracking.share(self.tracker, charts.sweep_view)

        notes = [
            f"no result: {f'{job.label}: ' if job.cfg else ''}{job.reason}" for job in lacking
        ]  # a mistake in a setting names the setting
        notes += [f"pruned: {job.label}" for job in pruned]
        rows, more = summarise([run_in(job.directory) for job in finished])
        if rows:
            for path in report.write(rows, [*notes, *more], f"{self.name} ({self.id})", self.directory):
                self.tracker.artifact(path)
            report.show(rows, more, f"{self.name} ({self.id})")
        stopped = [job.status for job in lacking if is_stop(job.status)]
        counts = {"sweep/finished": len(finished), "sweep/stopped": len(stopped)}
        counts |= {"sweep/failed": len(lacking) - len(stopped), "sweep/pruned": len(pruned)}
        self.tracker.log(counts, len(finished))

        print(f"{self.directory}: {len(finished)} of {len(self.jobs)} jobs finished, {len(pruned)} pruned", flush=True)
        print(f"report: python -m src.report sweep={self.id} tracking={self.cfg.name}", flush=True)
        if charts_path:
            print(f"charts: mlflow ui, then http://127.0.0.1:5000/{charts_path}", flush=True)
        for note in notes:
            print(note, file=sys.stderr)
        if lacking:
            print(f"run again just what is missing: {_command()}", file=sys.stderr)
        self.status = (stopped[0] if stopped else 1) if lacking else 0
        return "FINISHED" if not lacking else "KILLED" if stopped else "FAILED"


def alternatives(union: Sequence[Grid], params: Grid, given: Grid, methods: Sequence[Sequence[str]]) -> Iterator[Grid]:
    """The grids of a union, with what the command line gives put in the place of what they have.

    Args:
        union: the alternatives.
        params: what all of them sweep.
        given: the command line.
        methods: of each alternative; none where it leaves that to the command line.
    """
    theirs = {key for grid in union for key in grid} - {"method"}

    def concerns(key: str, grid: Grid, names: Sequence[str]) -> bool:
        if key in theirs:
            return key in grid
        group, _, name = key.partition(".")
        settings = [fields(config.METHODS[each]) for each in names if group == "method" and name]
        return all(name.split(".")[0] in {field.name for field in each} for each in settings)

    for grid, names in zip(union, methods, strict=True):
        chosen = [each for each in names if each in given.get("method", names)]
        if names and not chosen:
            continue
        replaced = {key: values for key, values in given.items() if concerns(key, grid, chosen)}
        if "method" in grid:
            replaced |= {"method": chosen} if "method" in given else {}
        elif names:
            replaced.pop("method", None)  # an experiment brings its own
        merged = {**params, **grid, **replaced}
        # The command line's own order, its groups first: a job's command then reads as the sweep's did.
        yield {key: merged[key] for key in [*replaced, *(key for key in merged if key not in replaced)]}


def _command() -> str:
    """What the user typed; src/cli.py marks a single value as a choice of one."""
    typed = [re.sub(r"=choice\((\w+)\)$", r"=\1", argument) for argument in sys.argv[1:]]
    return redact(shlex.join(["python", "-m", "src.train", *typed]))


def register() -> None:
    """Make the sweeper and the launcher known to Hydra, which wants plugins to live in its namespace package."""
    sys.modules[PLUGINS] = sys.modules[__name__]
    for plugin in (GridSweeper, StudySweeper, LocalLauncher):
        plugin.__module__ = PLUGINS
        Plugins.instance().register(plugin)
