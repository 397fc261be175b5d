"""``hydra/sweeper`` of ``+sweep=optuna``: a search, whose jobs are the trials of an Optuna study."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from src.config import identity
from src.config.explain import whole_numbers
from src.errors import Diverged, UsageError
from src.runs.record import RECORD
from src.sweeps.dry_run import preview
from src.sweeps.grid import ALWAYS_SHOWN, GridSweeper, plain, refuse_unused, typed
from src.sweeps.jobs import Job, values
from src.sweeps.sweep import Sweep
from src.system.stopping import PRUNED

if TYPE_CHECKING:
    from src.sweeps.optuna_study import Study


class StudySweeper(GridSweeper):
    """A search by Optuna (src/sweeps/optuna_study.py): every job is a trial, its value the last ``val/knn_top1``.

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
        """Take up the trials that were cut off, then propose another whenever one ends, until there are enough."""
        from src.sweeps import optuna_study as studies  # optuna and torch take seconds

        if self.pruner not in studies.PRUNERS:
            raise UsageError(f"hydra.sweeper.pruner={self.pruner}: choose one of {', '.join(studies.PRUNERS)}")
        at_a_time = self.jobs_at_a_time(self.trials)
        if not self.config.dry_run:
            self.prepare()
            if self.config.jobs is None and at_a_time > 1:
                raise UsageError("jobs: say how many trials run at a time, as in jobs=4; all at once is no search")
        parsed = self.compose.parser.parse_overrides(
            [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        )
        keys = {each.get_key_element() for each in parsed}
        overrides = {plain(each.get_key_element(), keys): each for each in parsed}
        fixed = [typed(key, only[0]) for key, each in overrides.items() if (only := values(each)) and len(only) == 1]
        drawn = {key: each for key, each in overrides.items() if len(values(each) or ()) != 1}
        space = studies.space(drawn, whole_numbers())
        base = self.compose(fixed)
        if not base.cfg:  # what is fixed may be at odds with the defaults of what is drawn
            base = self.compose([*fixed, *studies.first(space)])
        base.passed_over = [key for key in base.passed_over if key not in space]
        refuse_unused([base])
        if not space:
            raise UsageError("hydra.sweeper.params: every setting is fixed; give one an interval or choices")
        if base.cfg and base.cfg.resume == "never":
            raise UsageError("resume=never: a search goes on from its trials; leave it out")
        if base.cfg and base.cfg.data.final:
            raise UsageError("data.final=true: leaves no validation images, by which a search judges its trials")
        if not space.keys() & {"experiment", "data", "data.root", "data.repo"}:  # which say where the images are
            base = self.compose.identify(base)
        if base.cfg is None:
            raise UsageError(base.error)

        def job(number: int) -> Job:
            assert study is not None
            point = study.points()[number]
            composed = self.compose.identify(
                self.compose([*fixed, *(f"{key}={value}" for key, value in point.items())])
            )
            composed.trial = number
            composed.status = composed.status or (PRUNED if study.state(number) == "PRUNED" else 0)
            return composed

        what = [identity.config_hash(base.cfg), *sorted(f"{key}={value}" for key, value in space.items())]
        sweep = Sweep("optuna", what, [], base.cfg.tracking)
        if self.config.dry_run:
            known = (sweep.directory / studies.FILE).exists()
            study = studies.Study(sweep.directory, space, self.pruner, self.seed) if known else None
            there = [job(number).cfg for number in study.points()] if study else []
            print(preview([cfg for cfg in there if cfg], at_a_time))
            print(f"{max(self.trials - len(there), 0)} trials to propose")
            return
        is_first = not (sweep.directory / RECORD).is_file()
        with sweep:
            study = studies.Study(sweep.directory, space, self.pruner, self.seed)
            if not (is_first or study.points()):
                anew = "has no trials: the search begins anew; jobs that it proposes again and that are finished stay"
                print(f"{sweep.directory / studies.FILE} {anew}", file=sys.stderr)
            sweep.jobs += [job(number) for number in study.points()]
            print(f"{sweep.directory}: {len(sweep.jobs)} of {self.trials} trials are there", flush=True)

            exhausted: list[UsageError] = []  # raised where all jobs have ended, not while one runs

            def lacks_figure(each: Job) -> bool:
                return each.is_finished and each.record is not None and studies.OBJECTIVE not in each.record.metrics

            unjudged = list(filter(lacks_figure, sweep.jobs))  # finished without the figure that the search is for

            def conclude(each: Job) -> None:
                _conclude(study, each)
                unjudged.extend(filter(lacks_figure, [each]))

            def trials() -> Iterator[Job]:
                there = [each for each in sweep.jobs if study.state(each.trial or 0) == "RUNNING"]
                while (there or len(sweep.jobs) < self.trials) and not unjudged:
                    if not there:
                        try:
                            there = [job(study.propose())]
                        except UsageError as error:
                            exhausted.append(error)
                            return
                        sweep.jobs.append(there[0])
                    each = there.pop(0)
                    if each.cfg and not each.is_finished:
                        yield each
                    else:
                        conclude(each)

            for each in self.launch(sweep, trials(), ALWAYS_SHOWN | space.keys(), at_a_time):
                conclude(each)
            if best := study.best():
                print(f"best: trial {best[0]}, val/knn_top1 {best[1]:.2f}, {study.points()[best[0]]}", flush=True)
            if unjudged:
                lacking = f"without labels there is no {studies.OBJECTIVE}, by which a search judges its trials"
                raise UsageError(f"data: {lacking}; choose images that have some")
            if exhausted:
                raise exhausted[0]
            if self.launcher.status and len(sweep.jobs) < self.trials:  # the last of its jobs may have ended by itself
                sys.exit(self.launcher.status)
        sys.exit(sweep.status)


def _conclude(study: Study, job: Job) -> None:
    """End a trial that would end again as it did; any other stays open, and the next command takes it up."""
    assert job.trial is not None
    value = job.record.metrics.get("val/knn_top1", math.nan) if job.is_finished and job.record else math.nan
    if math.isfinite(value):
        study.conclude(job.trial, "COMPLETE", value)
    elif job.status == PRUNED:
        study.conclude(job.trial, "PRUNED")
    elif job.cfg is None or job.is_finished or job.status == Diverged.status:
        study.conclude(job.trial, "FAIL")
