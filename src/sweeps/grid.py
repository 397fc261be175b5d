"""``hydra/sweeper=grid``: every combination of comma-separated values, each distinct configuration once."""

from __future__ import annotations

import logging
import math
import shlex
import sys
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig
from rich.progress import track

from src.config import identity
from src.config.explain import explain_key
from src.config.renamed import new_name
from src.errors import UsageError
from src.runs.directory import warn_of_other_protocol
from src.sweeps.jobs import (
    MAX_GRID_JOBS,
    OWN_FOLDER,
    Composer,
    Job,
    preview_of,
    refuse_equal_runs,
    refuse_other_folder,
    values,
)
from src.sweeps.launcher import FOREIGN, JobLauncher
from src.sweeps.sweep import Sweep
from src.system.output import in_terminal

logger = logging.getLogger(__name__)

Grid = Mapping[str, Sequence[str]]  # the values of each key, as on the command line
# Keys that a job's line shows when it starts, besides those in which the jobs differ.
ALWAYS_SHOWN = {"method", "support", "objective", "k", "queue_size", "seed"}


class GridSweeper(Sweeper):
    """``hydra/sweeper=grid``: the union of several grids, the alternatives, with each distinct configuration once.

    A key on the command line replaces the values that the sweep gives it; ``method`` selects among the alternatives. If
    the options of a combination do not have a key, the key is skipped there.

    Args:
        params: the values of each key that all alternatives sweep.
        union: the alternatives, each a line of overrides.
    """

    config: DictConfig
    hydra_context: HydraContext
    launcher: JobLauncher

    def __init__(self, params: Mapping[str, Any], union: Sequence[str] = ("",)) -> None:
        self.union = list(union)
        self.params = {key: str(value) for key, value in params.items()}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        refuse_other_folder(config.hydra.sweep)
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config
        self.composer = Composer(hydra_context.config_loader, config)

    def sweep(self, arguments: list[str]) -> None:
        """Run the jobs that are not finished, and summarise all jobs.

        Raises:
            UsageError: no job is legal, or another process runs the same sweep; nothing has been written then.
            SystemExit: in any other case. The status is 0 if all jobs finished, 1 if one failed, or that of what
                stopped the jobs; after a dry run it is 0, or 2 if a job is not legal.
        """
        if not self.config.dry_run:
            self.prepare()
        jobs = self.jobs(arguments)
        possible = [job for job in jobs if job.cfg]
        legal = [job.cfg for job in possible if job.cfg]
        if not legal:
            raise UsageError(jobs[0].error if jobs else "method: no alternative of this sweep has it")
        for job in jobs:
            if not job.cfg:
                print(f"not possible: {job.error} ({' '.join(job.overrides)})", file=sys.stderr, flush=True)
        if self.config.dry_run:
            print(preview_of(jobs, self.jobs_at_a_time(len(legal))))
            sys.exit(2 if len(legal) < len(jobs) else 0)
        name = self.config.hydra.runtime.choices.get("sweep") or "grid"
        hashes = sorted(map(identity.config_hash, legal))
        with Sweep(name, hashes, jobs, legal[0].tracking) as sweep:
            done, pending = list[Job](), list[Job]()
            for job in possible:
                (done if job.is_finished else pending).append(job)
            count = f"{len(jobs)} {'job' if len(jobs) == 1 else 'jobs'}, {len(done)} finished already"
            print(f"{sweep.directory}: {count}", flush=True)
            warn_of_other_protocol((job.cfg, record) for job in done if job.cfg and (record := job.record))
            times = Counter(each for job in pending for each in job.overrides)
            shown = ALWAYS_SHOWN | {each.split("=")[0] for each in times if times[each] < len(pending)}
            for _ in self.launcher.run(sweep, pending, shown, self.launcher.at_a_time):
                pass
        sys.exit(sweep.status)

    def jobs(self, arguments: list[str]) -> list[Job]:
        """Compose and check every distinct configuration.

        Raises:
            UsageError: there are too many combinations, or a key or a value is not possible in a grid.
        """
        given = self._grid(arguments)
        params = self._grid([f"{key}={value}" for key, value in self.params.items()])
        union = [self._grid(shlex.split(line)) for line in self.union]
        grids = list(alternatives(union, params, given, [self._methods(grid, params) for grid in union]))
        if sum(math.prod(map(len, grid.values())) for grid in grids) > MAX_GRID_JOBS:
            raise UsageError(f"--multirun: more than {MAX_GRID_JOBS:,} combinations; give the keys fewer values")
        points = [
            [to_override(key, value) for key, value in zip(grid, point, strict=True)]
            for grid in grids
            for point in product(*grid.values())
        ]
        watched = track(points, "composing jobs", transient=True, disable=not in_terminal())
        jobs = [self.composer(point) for point in watched]
        refuse_unused(jobs)
        distinct: dict[str, Job] = {}
        ignored: dict[str, str] = {}  # the first job that is left out, by the settings that it would have had
        for job in map(self.composer.identify, jobs):
            key = " ".join(job.overrides)
            if job.cfg:  # a dry run may not know whether two folders hold the same images
                key = f"{identity.config_hash(job.cfg)} {job.cfg.data.fingerprint or job.cfg.data.root}"
            kept = distinct.setdefault(key, job)
            if job.cfg and kept.cfg and (keys := identity.unhashed(job.cfg, kept.cfg)):
                ignored.setdefault(", ".join(keys), " ".join(job.overrides))
        for others, first in ignored.items():
            logger.warning("left out, because another %s makes no other run: %s", others, first)
        if any(job.cfg and job.cfg.output_dir for job in distinct.values()) and len(distinct) > 1:
            raise UsageError(OWN_FOLDER)
        # Sorted by seed: if something stops the sweep, the seeds that are done still make whole curves.
        return sorted(distinct.values(), key=lambda job: job.cfg.seed if job.cfg else 0)

    def _methods(self, grid: Grid, params: Grid) -> Sequence[str]:
        """The names of an alternative's methods; none if it leaves the method to the command line."""
        if "method" in grid or not {"experiment", "support"} & grid.keys():
            return grid.get("method", [])
        chosen = {
            key: each for key, each in {**params, **grid}.items() if key in ("experiment", "support", "objective")
        }
        bare = [
            self.composer(list(map("=".join, zip(chosen, each, strict=True)))) for each in product(*chosen.values())
        ]
        return [job.cfg.method.name for job in bare if job.cfg]

    def _grid(self, overrides: list[str]) -> Grid:
        grid: dict[str, list[str]] = {}
        for override in self.composer.parser.parse_overrides(overrides):
            if (found := values(override)) is None:
                raise UsageError(f"{override.input_line}: a grid wants single values; +sweep=optuna takes intervals")
            if len(found) > 1:
                refuse_equal_runs(override)
            grid[override.get_key_element()] = found
        return grid

    def jobs_at_a_time(self, count: int) -> int:
        """How many of ``count`` jobs run at once: with ``jobs=null`` one on this machine, and all on a cluster."""
        on_a_cluster = self.config.hydra.runtime.choices["hydra/launcher"] != "local"
        return self.config.jobs or (count if on_a_cluster else 1)

    def prepare(self) -> None:
        """Create the launcher before anything is written, because this fails if its package is not installed."""
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=self.hydra_context, task_function=self.task_function, config=self.config
        )
        if not isinstance(launcher, JobLauncher):
            raise UsageError(f"hydra/launcher={self.config.hydra.runtime.choices['hydra/launcher']}: {FOREIGN}")
        self.launcher = launcher


def to_override(key: str, value: str) -> str:
    """Write a key and its value as an override for Hydra.

    ``~key=null`` becomes ``~key``, because Hydra 1.4 deletes a key only if its value is the given one.
    """
    return key if key[0] == "~" and value == "null" else f"{key}={value}"


def known_key(key: str, there: Container[str]) -> str:
    """Replace a key by its new name, or else drop its ``++``, if ``there`` has the result; else return it unchanged."""
    bare = key.removeprefix("++")
    return next((name for name in (new_name(bare), bare) if name and name in there), key)


def refuse_unused(jobs: Sequence[Job]) -> None:
    """Raise a `UsageError` for a key that every job skipped, including the jobs that are not legal."""
    nowhere = set.intersection(*(set(job.skipped_keys) for job in jobs)) if jobs else set()
    if nowhere and any(job.cfg for job in jobs):
        there = {key for job in jobs if job.cfg for key in identity.flat(job.cfg)}
        raise UsageError(explain_key(min(nowhere), sorted(there)))


def alternatives(union: Sequence[Grid], params: Grid, given: Grid, methods: Sequence[Sequence[str]]) -> Iterator[Grid]:
    """Yield the grids of a union, in which the values of the command line replace those of the sweep.

    Args:
        union: the alternatives.
        params: the values that all alternatives sweep.
        given: the values on the command line. A key that some alternatives sweep concerns only those.
        methods: the methods of each alternative; none if it leaves the method to the command line.
    """
    there = {key for grid in (*union, params, given) for key in grid}
    *union, params, given = (
        {known_key(key, there): each for key, each in grid.items()} for grid in (*union, params, given)
    )
    theirs = {key for grid in union for key in grid} - {"method"}
    for grid, names in zip(union, methods, strict=True):
        chosen = [each for each in names if each in given.get("method", names)]
        if names and not chosen:
            continue
        replaced = {key: each for key, each in given.items() if key in grid or key not in theirs}
        if "method" in grid:
            replaced |= {"method": chosen} if "method" in given else {}
        elif names:
            replaced.pop("method", None)  # because the alternative sets the method itself
        merged = {**params, **grid, **replaced}
        # The keys of the command line come first, in its order, so that a job's command reads like the sweep's.
        yield {key: merged[key] for key in [*replaced, *(key for key in merged if key not in replaced)]}
