"""A search over settings by Optuna, kept in ``study.db`` in its sweep's folder. The only file that imports optuna.

What hydra-optuna-sweeper leaves open is closed here: the same command continues to the same total, a seeded sampler
does not repeat itself, points are distinct, a trial that was cut off is taken up again, and hopeless ones are pruned.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from src.errors import UsageError
from src.system.seeding import mix

OBJECTIVE = "val/knn_top1"  # never a figure of the test images
PRUNERS = ("median", "halving", "none")
FILE = "study.db"
ATTEMPTS = 100

logger = logging.getLogger(__name__)


def space(overrides: Sequence[Override], base: DictConfig) -> dict[str, Any]:
    """The distribution of each key that is not fixed, in hydra-optuna-sweeper's notation.

    As everywhere in Hydra a ``range`` excludes its end, and a key that holds an integer gets integers.

    Raises:
        UsageError: a choice or an interval that Optuna cannot draw from.
    """
    from hydra_plugins.hydra_optuna_sweeper._impl import create_optuna_distribution_from_override
    from optuna import distributions

    drawn = {}
    for override in overrides:
        if not override.is_sweep_override():
            continue
        key = override.get_key_element()
        try:
            distribution = create_optuna_distribution_from_override(override)
        except (AssertionError, ValueError, NotImplementedError) as error:
            raise UsageError(f"{override.input_line}: Optuna cannot draw from that ({error})") from None
        if isinstance(distribution, distributions.IntUniformDistribution) and override.is_range_sweep():
            last = distribution.high - distribution.step
            distribution = distributions.IntUniformDistribution(distribution.low, last, distribution.step)
        elif isinstance(OmegaConf.select(base, key), int) and override.is_interval_sweep():
            low, high = int(distribution.low), int(distribution.high)
            logarithmic = isinstance(
                distribution, (distributions.LogUniformDistribution, distributions.IntLogUniformDistribution)
            )
            whole = distributions.IntLogUniformDistribution if logarithmic else distributions.IntUniformDistribution
            distribution = whole(low, high)
        drawn[key] = distribution
    return drawn


class Study:
    """Trials, each a point of the space; one process at a time proposes and concludes.

    Args:
        folder: the sweep's.
        distributions: from `space`.
        pruner: one of `PRUNERS`.
        seed: proposals are a function of it and of the trials before.
    """

    def __init__(self, folder: Path, distributions: Mapping[str, Any], pruner: str, seed: int) -> None:
        self.distributions, self.seed = dict(distributions), seed
        self.study = _open(folder)
        self.study.set_user_attr("pruner", pruner)
        for trial in self.study.trials:
            if trial.state.name == "RUNNING" and trial.params.keys() != self.distributions.keys():
                _tell(self.study, trial.number, "FAIL")  # cut off before it had its point

    def points(self) -> dict[int, dict[str, Any]]:
        """Every trial that has its point: its number, and the point."""
        keys = self.distributions.keys()
        return {trial.number: trial.params for trial in self.study.trials if trial.params.keys() == keys}

    def state(self, number: int) -> str:
        """``RUNNING`` until `conclude`, then ``COMPLETE``, ``PRUNED`` or ``FAIL``."""
        return self.study.trials[number].state.name

    def propose(self) -> int:
        """A new trial, at a point that no other has; returns its number.

        The point is drawn in a copy of the study and enqueued before the trial is begun: whatever a kill leaves behind
        is a trial with its point, or none.

        Raises:
            UsageError: no other point was found.
        """
        if not any(trial.state.name == "WAITING" for trial in self.study.trials):
            with _quiet():
                self.study.enqueue_trial(self._draw())
        return self.study.ask(self.distributions).number

    def _draw(self) -> dict[str, Any]:
        import optuna

        trials = self.study.trials
        taken = [trial.params for trial in trials]
        for attempt in range(ATTEMPTS):
            seed = mix(self.seed, len(trials) * ATTEMPTS + attempt) % 2**32
            with _quiet():
                sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
                scratch = optuna.create_study(direction="maximize", sampler=sampler)
                scratch.add_trials(trials)
            point = scratch.ask(self.distributions).params
            if point not in taken:
                return point
        raise UsageError(f"{len(taken)} trials: {ATTEMPTS} draws found no other point; widen hydra.sweeper.params")

    def conclude(self, number: int, state: str, value: float | None = None) -> None:
        """Ends a trial as ``COMPLETE`` with its value, ``PRUNED`` or ``FAIL``."""
        _tell(self.study, number, state, value)

    def best(self) -> tuple[int, float] | None:
        """The number and the value of the best complete trial."""
        if not any(trial.state.name == "COMPLETE" for trial in self.study.trials):
            return None
        return self.study.best_trial.number, self.study.best_value


def is_hopeless(folder: str | None, number: int | None, epoch: int, metrics: Mapping[str, float]) -> bool:
    """Tells a trial's study how the trial does after an epoch; returns whether it lags so far behind as to stop it.

    A study that does not answer prunes nothing, and stops nothing.
    """
    if folder is None or number is None or OBJECTIVE not in metrics:
        return False
    try:
        import optuna

        study = _open(Path(folder))
        pruners = {
            "median": optuna.pruners.MedianPruner(n_startup_trials=4),
            "halving": optuna.pruners.SuccessiveHalvingPruner(),
            "none": optuna.pruners.NopPruner(),
        }
        study.pruner = pruners[study.user_attrs["pruner"]]
        trial = optuna.trial.Trial(study, study.trials[number]._trial_id)
        with _quiet():
            trial.report(metrics[OBJECTIVE], epoch)  # said twice, after a resume, it counts once
        return trial.should_prune()
    except Exception as error:
        logger.warning("the study in %s does not answer, so nothing is pruned: %s", folder, error)
        return False


def _open(folder: Path) -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = f"sqlite:///{folder / FILE}"
    storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})
    return optuna.create_study(storage=storage, study_name="sweep", direction="maximize", load_if_exists=True)


def _tell(study: Any, number: int, state: str, value: float | None = None) -> None:
    from optuna.trial import TrialState

    study.tell(number, value, state=TrialState[state])


def _quiet() -> Any:
    """Optuna 2 calls what is used here experimental, and says so each time."""
    return warnings.catch_warnings(action="ignore")
