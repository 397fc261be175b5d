"""The jobs of a sweep: each is one configuration, composed as the command line of a single run composes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice, product
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.config import identity
from src.config.chosen import settled
from src.config.explain import explain_composition, known_keys
from src.config.parse import parse
from src.config.renamed import new_name
from src.config.schema import Config
from src.data.cache import fingerprint, known_fingerprint
from src.errors import UsageError
from src.runs import directory as run_directory
from src.runs import origin
from src.runs.record import TAG_ERROR, Record
from src.sweeps.dry_run import preview

SWEEP_KEYS = ("jobs", "dry_run", "max_minutes", "resume")  # keys that concern a sweep as a whole
OBJECTIVE = "val/knn_top1"  # the metric that a search maximises; never one of the test images
FINAL = "data.final=true: leaves no validation images, by which a search judges its trials"
UNLABELLED = (
    f"data: without labels there is no {OBJECTIVE}, by which a search judges its trials; choose images that have some"
)
OWN_FOLDER = "output_dir: each job of a sweep has a folder of its own under multirun/; leave it out"
NEVER = "resume=never: a search goes on from its trials; leave it out, and remove the folders of runs to train anew"
MISTAKES = (UsageError, HydraException, OmegaConfBaseException)  # what composing and parsing raise
MAX_GRID_JOBS = 10_000  # composing so many takes a quarter of an hour


@dataclass(eq=False)  # compared by identity, so that a job can be a key of a dict
class Job:
    """One configuration of a sweep."""

    overrides: list[str]
    cfg: Config | None  # None: the configuration is not legal
    directory: Path
    skipped_keys: Sequence[str] = ()  # keys that the chosen options do not have
    error: str = ""  # why there is no result
    status: int = 0  # the exit status that goes with the error
    trial: int | None = None  # the number of its trial in a search

    @classmethod
    def impossible(cls, overrides: list[str], skipped_keys: Sequence[str], reason: str) -> Job:
        """Make a job whose configuration is not legal."""
        return cls(overrides, None, Path(), skipped_keys, " ".join(reason.split()), status=2)

    @property
    def label(self) -> str:
        """A name for messages: the folder's or, if the job is not legal, its last override."""
        return self.directory.name if self.cfg else self.overrides[-1]

    @property
    def configuration(self) -> str:
        """What distinguishes the configuration; overrides that differ only in skipped keys make the same one."""
        return str(self.directory) if self.cfg else " ".join(self.overrides)

    @property
    def record(self) -> Record | None:
        """The record in the job's folder; None before its start, or if it is damaged, which the job itself reports."""
        with suppress(UsageError):
            return Record.find(self.directory, hash_rows=False) if self.cfg else None
        return None

    @property
    def reason(self) -> str:
        """Why the job has no result."""
        return self.error or (self.record.tags.get(TAG_ERROR, "not finished") if self.record else "not started")

    @property
    def is_finished(self) -> bool:
        """Whether the job's folder has the result of its configuration."""
        with suppress(UsageError):  # a damaged record, or one of another configuration, which the job itself reports
            return self.cfg is not None and run_directory.is_finished(self.directory, self.cfg)
        return False

    @property
    def is_hopeless(self) -> bool:
        """Whether the same command ends the same way, because the job is not legal, has diverged or has collapsed."""
        if self.cfg is None:
            return True
        return (record := self.record) is not None and run_directory.is_hopeless(record, self.cfg)

    @property
    def result(self) -> Record | None:
        """The job's record if it is finished, else None."""
        return self.record if self.is_finished else None


class Composer:
    """Makes jobs from overrides: Hydra composes each choice of options once, and a job's values are set in a copy.

    A value is set, under the key's present name, if the chosen options have the key; otherwise the key is skipped. So a
    grid over ``support=queue,kmeans`` may have both ``queue_size`` and ``k``.

    Args:
        loader: Hydra's config loader.
        base: the composed config of the sweep's command.
    """

    def __init__(self, loader: Any, base: DictConfig) -> None:
        self.loader, self.base = loader, base
        self.parser = OverridesParser.create(config_loader=loader)
        self.groups = set(loader.list_groups(""))
        self._chosen = cache(self._choose)
        self._parsed = cache(self.parser.parse_override)
        self._images: dict[str, tuple[str | None, str]] = {}  # each data source's fingerprint, and why it has none

    def __call__(self, overrides: Sequence[str]) -> Job:
        """Make a job with its config or, if the configuration is not legal, with the reason."""
        choices = tuple(each for each in overrides if self._is_choice(each))
        others = [each for each in overrides if each not in choices]
        try:
            composed = self._chosen(choices).copy()
        except MISTAKES as error:  # options that cannot be chosen together may have any key but a misspelt one
            misspelt = {each.split("=")[0] for each in others} - set(known_keys())
            return Job.impossible(list(choices), sorted(misspelt), explain_composition(error))
        kept, skipped_keys = list(choices), list[str]()
        try:
            for each in others:
                if set_ := _set(composed, self._parsed(each)):
                    kept.append(set_)
                else:
                    skipped_keys.append(each.split("=")[0])
            cfg = parse(composed)
        except MISTAKES as error:
            return Job.impossible(kept, skipped_keys, explain_composition(error))
        return Job(kept, cfg, run_directory.path_of(cfg), skipped_keys)

    def unused(self, overrides: Sequence[str], drawn: Mapping[str, Override]) -> set[str]:
        """The keys of a search that all its jobs skip, whichever options they have.

        Args:
            overrides: the overrides of one job.
            drawn: what the search draws from, by key; only that of groups matters here.
        """
        options = {key: found for key, each in drawn.items() if key in self.groups and (found := values(each))}
        point = {each.split("=")[0]: each for each in overrides}
        unused = set(point)
        for combination in product(*options.values()):
            chosen = {group: f"{group}={option}" for group, option in zip(options, combination, strict=True)}
            unused &= set(self(list((point | chosen).values())).skipped_keys)
            if not unused:
                break
        return unused

    def identify(self, job: Job) -> Job:
        """Find out which images and first weights the job has, and so its directory; without them it is not legal.

        The images of several jobs are looked for only once, and decoded if necessary, except in a dry run.
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
            return Job.impossible(job.overrides, job.skipped_keys, reason)
        return replace(job, directory=run_directory.path_of(job.cfg))

    def _is_choice(self, override: str) -> bool:
        """Whether an override chooses an option, or adds or removes a key, which is left to Hydra."""
        key = override.split("=")[0]
        return key in self.groups or key[0] in "+~" or "/" in key or "@" in key

    def _choose(self, choices: tuple[str, ...]) -> DictConfig:
        """Compose the config with the chosen options, without Hydra's own part, so that values can be set in it."""
        return settled(self.loader.load_sweep_config(self.base, list(choices)), self.loader)


def preview_of(jobs: Sequence[Job], at_a_time: int) -> str:
    """List the legal ones of the jobs (`src.sweeps.dry_run.preview`), each beside its `distinguishing_overrides`."""
    possible = [job for job in jobs if job.cfg]
    return preview([job.cfg for job in possible if job.cfg], at_a_time, distinguishing_overrides(possible))


def refuse_equal_runs(override: Override) -> None:
    """Raise a `UsageError` if the key does not distinguish runs, because all but one of its values would be dropped."""
    key = override.key_or_group
    if not identity.is_setting(key) and key not in identity.BY_CONTENT:
        beside = "; src.evaluate adds the figures of others" if key.startswith("evaluation") else ""
        raise UsageError(f"{override.input_line}: makes no other run, so give it one value{beside}")


def refuse_as_choice(override: Override) -> None:
    """Raise a `UsageError` if a search, which keeps the best of what it has tried, must not choose the key's value."""
    if override.key_or_group == "data.final":
        raise UsageError(FINAL)
    if override.key_or_group == "seed":
        instead = "give one, and repeat the best settings as a sweep with several"
        raise UsageError(f"{override.input_line}: a search would choose the luckiest seed; {instead}")


def refuse_other_folder(sweep: DictConfig) -> None:
    """Raise a `UsageError` if the user has set where Hydra would put a sweep."""
    if (sweep.dir, sweep.subdir) != ("multirun", "."):
        raise UsageError("hydra.sweep: a sweep's folder is multirun/sweep-NAME-ID; leave hydra.sweep.* out")


def distinguishing_overrides(jobs: Sequence[Job]) -> list[str]:
    """For each job, its overrides that not all jobs of the same name have; empty if no other job has the name."""
    named = [(identity.run_name(job.cfg) if job.cfg else "", job.overrides) for job in jobs]
    jobs_of = Counter(name for name, _ in named)
    times = Counter((name, each) for name, overrides in named for each in overrides)
    return [" ".join(each for each in mine if times[name, each] < jobs_of[name]) for name, mine in named]


def values(override: Override) -> list[str] | None:
    """The values that an override sets or sweeps, as on the command line; None for an interval.

    Of more than `MAX_GRID_JOBS` + 1 values, only so many are returned.
    """
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    return list(islice(override.sweep_string_iterator(), MAX_GRID_JOBS + 1)) if override.is_discrete_sweep() else None


def _set(composed: DictConfig, override: Override) -> str:
    """Set a value in place; return the override with the key's present name, or '' if there is no such key."""
    for key in (override.key_or_group, new_name(override.key_or_group)):
        parent, _, leaf = (key or "").rpartition(".")
        node = OmegaConf.select(composed, parent) if parent else composed
        if key and isinstance(node, DictConfig) and leaf in node.keys():  # noqa: SIM118  # `in` overlooks a "???"
            OmegaConf.update(composed, key, override.value(), merge=True)
            return f"{key}={override.get_value_element_as_str()}"
    return ""
