"""The jobs of a sweep: each one configuration, composed as the command line of a single run would compose it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from src.config import identity
from src.config.explain import explain_composition
from src.config.parse import parse
from src.config.renamed import new_name
from src.config.schema import Config
from src.data.cache import fingerprint, known_fingerprint
from src.errors import UsageError
from src.runs import directory as run_directory
from src.runs import origin
from src.runs.record import TAG_ERROR, Record

MAX_GRID_JOBS = 10_000  # to compose so many takes a quarter of an hour


@dataclass(eq=False)  # a job is itself, and a key of dicts
class Job:
    """One configuration of a sweep."""

    overrides: list[str]
    cfg: Config | None  # None: not legal
    directory: Path
    passed_over: Sequence[str] = ()  # keys that the chosen options do not have
    error: str = ""  # why there is no result
    status: int = 0  # the exit status it ended with, where there is an error
    trial: int | None = None  # its number in a study

    @classmethod
    def impossible(cls, overrides: list[str], passed_over: Sequence[str], reason: str) -> Job:
        """One whose configuration is not legal."""
        return cls(overrides, None, Path(), passed_over, " ".join(reason.split()), status=2)

    @property
    def label(self) -> str:
        """What tells it from the others, for people."""
        return self.directory.name if self.cfg else self.overrides[-1]

    @property
    def record(self) -> Record | None:
        """The record in its folder; None before its start, or where it is damaged, which the job itself reports."""
        with suppress(UsageError):
            return Record.find(self.directory, hash_rows=False) if self.cfg else None
        return None

    @property
    def reason(self) -> str:
        """Why it has no result."""
        return self.error or (self.record.tags.get(TAG_ERROR, "not finished") if self.record else "not started")

    @property
    def is_finished(self) -> bool:
        with suppress(UsageError):  # as `record`
            return self.cfg is not None and run_directory.is_finished(self.directory, self.cfg)
        return False

    @property
    def result(self) -> Record | None:
        """Its record, where it is finished."""
        return self.record if self.is_finished else None


class Composer:
    """Makes jobs of overrides: Hydra composes each choice of options once, and a job's values are set on a copy.

    A value is set where the chosen options have its key, under the key's present name, and passed over elsewhere: a
    grid over ``support=queue,kmeans`` may have both ``queue_size`` and ``k``.

    Args:
        loader: Hydra's.
        base: the sweep's own composed config.
    """

    def __init__(self, loader: Any, base: DictConfig) -> None:
        self.loader, self.base = loader, base
        self.parser = OverridesParser.create(config_loader=loader)
        self.groups = set(loader.list_groups(""))
        self._chosen = cache(self._choose)
        self._parsed = cache(self.parser.parse_override)
        self._images: dict[str, tuple[str | None, str]] = {}  # of a source its fingerprint, or what is wrong with it

    def __call__(self, overrides: Sequence[str]) -> Job:
        """A job with its config; one that is not legal with the reason."""
        choices = tuple(each for each in overrides if self._is_choice(each))
        kept, passed_over = list(choices), list[str]()
        try:
            composed = self._chosen(choices).copy()
            for each in overrides:
                if each in choices:
                    continue
                if set_ := _set(composed, self._parsed(each)):
                    kept.append(set_)
                else:
                    passed_over.append(each.split("=")[0])
            cfg = parse(composed)
        except (UsageError, HydraException, OmegaConfBaseException) as error:
            return Job.impossible(kept, passed_over, explain_composition(error))
        return Job(kept, cfg, run_directory.path_of(cfg), passed_over)

    def identify(self, job: Job) -> Job:
        """Say which images and first weights the job has, and so where it lives; without them it is not legal.

        All jobs on the same images look for them once, and decode them if need be, except in a dry run.
        """
        if job.cfg is None:
            return job
        data = job.cfg.data
        source = repr(replace(data, limit=None, final=False, val_fraction=0.0, split_seed=0))
        if source not in self._images:
            try:
                found = (known_fingerprint if self.base.dry_run else fingerprint)(data)
                self._images[source] = found or data.fingerprint, ""
            except UsageError as error:
                self._images[source] = None, str(error)
        data.fingerprint, reason = self._images[source]
        try:
            origin.identify(job.cfg)
        except UsageError as error:
            reason = str(error)
        if reason:
            return Job.impossible(job.overrides, job.passed_over, reason)
        return replace(job, directory=run_directory.path_of(job.cfg))

    def _is_choice(self, override: str) -> bool:
        """Whether it chooses an option, or adds or takes away a key, which is left to Hydra."""
        key = override.split("=")[0]
        return key in self.groups or key[0] in "+~" or "/" in key or "@" in key

    def _choose(self, choices: tuple[str, ...]) -> DictConfig:
        composed = self.loader.load_sweep_config(self.base, list(choices))
        with flag_override(composed, ["struct", "readonly"], False):
            del composed["hydra"]
        return composed


def told_apart(jobs: Sequence[Job]) -> list[str]:
    """Of each job its overrides that not all jobs of its name have, which is none where no other has the name."""
    named = [(identity.run_name(job.cfg) if job.cfg else "", job.overrides) for job in jobs]
    jobs_of = Counter(name for name, _ in named)
    times = Counter((name, each) for name, overrides in named for each in overrides)
    return [" ".join(each for each in mine if times[name, each] < jobs_of[name]) for name, mine in named]


def values(override: Override) -> list[str] | None:
    """What an override sets or sweeps, as on the command line, cut off beyond `MAX_GRID_JOBS`; None for an interval."""
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    return list(islice(override.sweep_string_iterator(), MAX_GRID_JOBS + 1)) if override.is_discrete_sweep() else None


def _set(composed: DictConfig, override: Override) -> str:
    """Set a value in place; return the override under the key's present name, empty if there is no such key."""
    for key in (override.key_or_group, new_name(override.key_or_group)):
        parent, _, leaf = (key or "").rpartition(".")
        node = OmegaConf.select(composed, parent) if parent else composed
        if key and isinstance(node, DictConfig) and leaf in node.keys():  # noqa: SIM118  # `in` passes over "???"
            OmegaConf.update(composed, key, override.value(), merge=True)
            return f"{key}={override.get_value_element_as_str()}"
    return ""
