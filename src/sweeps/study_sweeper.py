"""The sweeper of ``+sweep=optuna``: a search, whose jobs are the trials of an Optuna study."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from src.config import identity
from src.config.explain import known_keys, whole_numbers
from src.config.schema import Config
from src.data import Dataset, load
from src.data.cache import known_fingerprint
from src.errors import Diverged, UsageError
from src.runs.directory import warn_of_other_protocol
from src.runs.record import RECORD, TAG_SUPPORT_UNUSED
from src.sweeps.grid import ALWAYS_SHOWN, GridSweeper, known_key, refuse_unused, to_override
from src.sweeps.jobs import FINAL, NEVER, UNLABELLED, Job, preview_of, refuse_as_choice, refuse_equal_runs, values
from src.sweeps.sweep import Sweep
from src.system.stopping import PRUNED

if TYPE_CHECKING:
    from src.sweeps.optuna_study import Study


class StudySweeper(GridSweeper):
    """A search by Optuna (src/sweeps/optuna_study.py): every job is a trial, its value the last ``val/knn_top1``.

    Args:
        trials: the total number of trials, including those of earlier commands.
        pruner: how to stop hopeless trials early: ``median``, ``halving`` or ``none``.
        seed: the seed of the search.
        params: the search space. A key on the command line replaces the key's distribution, or fixes its value.
    """

    def __init__(self, trials: int, pruner: str, seed: int, params: Mapping[str, Any]) -> None:
        super().__init__(params=params)
        self.trials, self.pruner, self.seed = trials, pruner, seed
        self.data: dict[str, Dataset] = {}  # the data sets that have been loaded, by their settings

    def sweep(self, arguments: list[str]) -> None:
        """Take up the interrupted trials, then propose another one whenever one ends, until there are ``trials``.

        Raises:
            UsageError: the search is not possible, no further point is found, or the trials cannot be judged.
            SystemExit: as in `GridSweeper.sweep`, but not after a dry run.
        """
        from src.sweeps import optuna_study as studies  # late, because optuna and torch take seconds to import

        if self.pruner not in studies.PRUNERS:
            raise UsageError(f"hydra.sweeper.pruner={self.pruner}: choose one of {', '.join(studies.PRUNERS)}")
        if not (isinstance(self.trials, int) and self.trials > 0):
            raise UsageError(f"hydra.sweeper.trials={self.trials}: must be a whole number, 1 or more")
        at_a_time = self.jobs_at_a_time(self.trials)
        if not self.config.dry_run:
            self.prepare()
            if self.config.jobs is None and at_a_time > 1:
                raise UsageError("jobs: say how many trials run at a time, as in jobs=4; all at once is no search")
        fixed, space, base = self._space(arguments)
        assert base.cfg is not None
        some = sorted(each for each in fixed if each.split("=")[0] in base.skipped_keys)  # only some trials have these
        what = [identity.config_hash(base.cfg), *some, *sorted(f"{key}={value}" for key, value in space.items())]
        sweep = Sweep("optuna", what, [], base.cfg.tracking)
        if self.config.dry_run:
            file = sweep.directory / studies.FILE
            there = file.exists() and file.stat().st_size  # an empty one counts as a missing one
            study = studies.Study(sweep.directory, space, None, self.seed) if there else None
            jobs = self._jobs(fixed, study) if study else []
            print(preview_of(jobs, at_a_time))
            print(f"{max(self.trials - len(jobs), 0)} trials to propose")
            return
        is_first = not (sweep.directory / RECORD).is_file()
        with sweep:
            study = studies.Study(sweep.directory, space, self.pruner, self.seed)
            sweep.jobs += self._jobs(fixed, study)
            if not (is_first or sweep.jobs):
                anew = "has no trials: the search begins anew; jobs that it proposes again and that are finished stay"
                print(f"{sweep.directory / studies.FILE} {anew}", file=sys.stderr)
            print(f"{sweep.directory}: {len(sweep.jobs)} of {self.trials} trials are there", flush=True)
            warn_of_other_protocol((job.cfg, done) for job in sweep.jobs if job.cfg and (done := job.result))
            trials = _Trials(study, sweep.jobs, self.trials, partial(self._job, fixed))
            for job in self.launcher.run(sweep, trials, ALWAYS_SHOWN | space.keys(), at_a_time):
                trials.conclude(job)
            trials.settle()  # other processes may have finished jobs whose folders they held
            sweep.best = study.best({job.trial: job.skipped_keys for job in sweep.jobs if job.trial is not None})
            if trials.unjudged:
                raise UsageError(UNLABELLED)
            if trials.exhausted:
                raise trials.exhausted
            if self.launcher.status and len(sweep.jobs) < self.trials:  # stopped, though all its jobs may have finished
                sys.exit(self.launcher.status)
        sys.exit(sweep.status)

    def _space(self, arguments: list[str]) -> tuple[list[str], dict[str, Any], Job]:
        """Split the overrides into those that all trials share and those that a trial draws.

        Returns:
            The shared overrides, the distributions of the other keys, and a legal job that stands for all trials.

        Raises:
            UsageError: the search is not possible, or its trials could not be judged.
        """
        from src.sweeps import optuna_study as studies

        params = self.composer.parser.parse_overrides([f"{key}={value}" for key, value in self.params.items()])
        typed = self.composer.parser.parse_overrides(arguments)
        keys = {each.get_key_element() for each in (*params, *typed)}
        overrides = {known_key(each.get_key_element(), keys): each for each in (*params, *typed)}
        fixed = [
            to_override(key, only[0]) for key, each in overrides.items() if (only := values(each)) and len(only) == 1
        ]
        drawn = {key: each for key, each in overrides.items() if len(values(each) or ()) != 1}
        for each in drawn.values():
            refuse_equal_runs(each)
            refuse_as_choice(each)
        space = studies.space(drawn, whole_numbers())
        base = self.composer(fixed)
        if not base.cfg:  # the fixed values may contradict the defaults of the keys that are drawn
            base = self.composer([*fixed, *studies.first(space)])
        unused = self.composer.unused([*fixed, *studies.first(space)], drawn)
        unused -= {key for key in known_keys() if overrides.get(key) in params}  # the sweep is for several methods
        refuse_unused([replace(base, skipped_keys=sorted(unused))])
        if not space:
            raise UsageError("hydra.sweeper.params: every setting is fixed; give one an interval or choices")
        if base.cfg and base.cfg.resume == "never":
            raise UsageError(NEVER)
        if base.cfg and base.cfg.data.final:
            raise UsageError(FINAL)
        if not space.keys() & {"experiment", "data", "data.root", "data.repo"}:  # these choose the images
            base = self.composer.identify(base)
        if base.cfg is None:
            raise UsageError(base.error)
        return fixed, space, base

    def _jobs(self, fixed: list[str], study: Study) -> list[Job]:
        """Make the jobs of the trials that there are, each distinct configuration once."""
        distinct: dict[str, Job] = {}
        for number, trial in study.trials().items():
            job = self._job(fixed, trial.params)
            job.trial = number
            job.status = job.status or (PRUNED if trial.state.name == "PRUNED" else 0)
            distinct.setdefault(job.configuration, job)
        return list(distinct.values())

    def _job(self, fixed: list[str], point: Mapping[str, Any]) -> Job:
        """Make the job of a point of the space."""
        job = self.composer.identify(self.composer([*fixed, *(f"{key}={value}" for key, value in point.items())]))
        if job.cfg and (reason := self._refused(job.cfg)):
            return Job.impossible(job.overrides, job.skipped_keys, reason)
        return job

    def _refused(self, cfg: Config) -> str:
        """Say why there are too few images for a trial's settings; empty if there are enough.

        A job that refuses its own settings ends with the status of every mistake, also of those that a user can mend
        without another trial, such as an MLflow store that does not open. So the search would leave the trial open.
        """
        from src.training.checks import refuse_large_batch, refuse_unfillable

        images = repr(cfg.data)
        try:
            if images not in self.data and known_fingerprint(cfg.data):  # a dry run decodes nothing
                self.data[images] = load(cfg.data)
            if data := self.data.get(images):
                refuse_large_batch(cfg, data)
                refuse_unfillable(cfg, len(data.train), filled=cfg.init is not None)
        except UsageError as error:
            return str(error)
        return ""


class _Trials:
    """The jobs of a search: those of interrupted trials, then new ones, until there are ``total``.

    Args:
        study: proposes the new trials.
        jobs: the jobs of all trials so far, to which new ones are added.
        total: how many trials there should be.
        job_of: makes the job of a point of the space.
    """

    def __init__(self, study: Study, jobs: list[Job], total: int, job_of: Callable[[Any], Job]) -> None:
        self.study, self.jobs, self.total, self.job_of = study, jobs, total, job_of
        self.exhausted: UsageError | None = None  # why no other was proposed; raised when all jobs have ended
        self.unjudged = [job for job in jobs if self._is_unjudged(job)]

    def __iter__(self) -> Iterator[Job]:
        self.settle()
        there = self._open()
        while (there or len(self.jobs) < self.total) and not self.unjudged:
            if not there:
                try:
                    number = self.study.propose(self._is_new)
                except UsageError as error:
                    self.exhausted = error
                    return
                there = [self.job_of(self.study.trials()[number].params)]
                there[0].trial = number
                self.jobs += there
            job = there.pop(0)
            if job.cfg and not job.is_finished:
                yield job
            else:
                self.conclude(job)

    def settle(self) -> None:
        """Bring the study in line with the folders of the jobs, in which other processes may work too."""
        self._reopen()
        for job in self._open():
            if job.is_finished:
                self.conclude(job)

    def _open(self) -> list[Job]:
        """The jobs of the trials that have not ended."""
        running = {number for number, trial in self.study.trials().items() if trial.state.name == "RUNNING"}
        return [job for job in self.jobs if job.trial in running]

    def _is_new(self, point: Mapping[str, Any]) -> bool:
        """Whether a point is another configuration than those of all jobs so far."""
        return self.job_of(point).configuration not in [job.configuration for job in self.jobs]

    def _reopen(self) -> None:
        """Begin the ended trials again that do not agree with the folders of their jobs."""
        jobs = {job.trial: job for job in self.jobs if job.cfg}
        trials = {number: trial for number, trial in self.study.trials().items() if trial.state.name != "RUNNING"}
        outdated = {
            number: jobs[number] for number in trials.keys() & jobs if self._is_outdated(trials[number], jobs[number])
        }
        if outdated:
            self.study.reopen(outdated)
        for job in outdated.values():
            job.status = 0

    def _is_outdated(self, trial: Any, job: Job) -> bool:
        """Whether a job's folder has been removed or has another value than the ended trial, or the job can go on."""
        if trial.state.name == "FAIL" and not job.is_finished:
            return not job.is_hopeless  # a job that collapsed goes on with on_collapse=warn
        known = trial.value if trial.state.name == "COMPLETE" else math.nan  # a pruned one has its last report
        return not (job.record and str(self._value(job)) == str(known))  # as text, in which NaN equals NaN

    def conclude(self, job: Job) -> None:
        """End a trial that would end the same way again; any other stays open, and the next command takes it up."""
        assert job.trial is not None
        value = self._value(job)
        if math.isfinite(value):
            self.study.conclude(job.trial, "COMPLETE", value)
        elif job.status == PRUNED:
            self.study.conclude(job.trial, "PRUNED")
        elif job.cfg is None or job.is_finished or job.status == Diverged.status:
            self.study.conclude(job.trial, "FAIL")
        if self._is_unjudged(job):
            self.unjudged.append(job)

    def _value(self, job: Job) -> float:
        """The metric that the search maximises, from the job's folder; NaN if it is not there, or must not be the best.

        If the support set was never filled, the run is that of nothing stored, and reports leave it out.
        """
        result = job.result
        if not result or TAG_SUPPORT_UNUSED in result.tags:
            return math.nan
        return result.metrics.get(self.study.objective, math.nan)

    def _is_unjudged(self, job: Job) -> bool:
        """Whether a job has finished without the metric that the search maximises."""
        result = job.result
        return result is not None and self.study.objective not in result.metrics
