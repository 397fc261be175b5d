"""A search over settings by Optuna, kept in ``study.db`` in its sweep's folder. The only file that imports optuna.

What hydra-optuna-sweeper leaves open is closed here: the same command continues to the same total, a seeded sampler
does not repeat itself, points are distinct, a trial that was cut off is taken up again, and hopeless ones are pruned.
"""

from __future__ import annotations

import logging
import os
import shlex
import sqlite3
import warnings
from collections.abc import Container, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override, Transformer
from hydra.errors import HydraException

from src.errors import UsageError
from src.system.redact import one_line, redact
from src.system.seeding import mix

OBJECTIVE = "val/knn_top1"  # which a search maximises; never a metric of the test images
PRUNERS = ("median", "halving", "none")
FILE = "study.db"
DRAW_ATTEMPTS = 100  # to find a point that no trial has

logger = logging.getLogger(__name__)


def space(overrides: Mapping[str, Override], whole: Container[str]) -> dict[str, Any]:
    """The distribution of each key that is not fixed: choices, ``range``, ``interval``, ``tag(log, interval)``.

    As everywhere in Hydra a ``range`` excludes its end.

    Args:
        overrides: those that sweep, by their keys.
        whole: the keys that hold integers, and get them.

    Raises:
        UsageError: a choice or an interval that Optuna cannot draw from.
    """
    drawn = {}
    for key, override in overrides.items():
        if override.is_sweep_override():
            try:
                with _quiet():
                    drawn[key] = _distribution(override, key in whole)
            except (HydraException, ValueError) as error:
                raise UsageError(f"{override.input_line}: Optuna cannot draw from that ({error})") from None
    return drawn


def _distribution(override: Override, whole: bool) -> Any:
    from optuna.distributions import CategoricalDistribution

    swept: Any = override.value()
    if override.is_interval_sweep():
        kind = int if whole or isinstance(swept.start, int) else float
        return numbers(kind(swept.start), kind(swept.end), log="log" in swept.tags)
    swept.shuffle = False  # a draw has no order, and a search's folder is named by its distributions
    values: list[Any] = list(override.sweep_iterator(Transformer.encode))
    if not values:
        raise ValueError("it is empty")
    if override.is_range_sweep() and not isinstance(values[0], str):  # str(range(3)), since Hydra 1.4
        return numbers(min(values), max(values), type(values[0])(abs(swept.step)) or 1)
    return CategoricalDistribution(values)


def numbers(low: float, high: float, step: float | None = None, log: bool = False) -> Any:
    """From low to high, both included; whole ones where low is whole."""
    import optuna

    known: Any = optuna.distributions
    whole = isinstance(low, int)
    if hasattr(known, "IntDistribution"):  # since Optuna 3
        kind = known.IntDistribution if whole else known.FloatDistribution
        return kind(low, high, log=log, step=step or (1 if whole else None))
    if log:
        return (known.IntLogUniformDistribution if whole else known.LogUniformDistribution)(low, high)
    if whole:
        return known.IntUniformDistribution(low, high, step or 1)
    return known.DiscreteUniformDistribution(low, high, step) if step else known.UniformDistribution(low, high)


def first(space: Mapping[str, Any]) -> list[str]:
    """A point of the space: of each key the lowest number, or the first choice."""
    return [f"{key}={each.low if hasattr(each, 'low') else each.choices[0]}" for key, each in space.items()]


class Study:
    """Trials, each a point of the space; one process at a time proposes and concludes.

    Args:
        folder: the sweep's.
        distributions: from `space`.
        pruner: one of `PRUNERS`.
        seed: proposals are a function of it and of the trials before.
    """

    def __init__(self, folder: Path, distributions: Mapping[str, Any], pruner: str, seed: int) -> None:
        self.distributions, self.seed, self.objective = dict(distributions), seed, OBJECTIVE
        self.study = _open(folder, check=True)
        self.study.set_user_attr("pruner", pruner)
        for trial in self.study.trials:
            if trial.state.name == "RUNNING" and trial.params.keys() != self.distributions.keys():
                self.conclude(trial.number, "FAIL")  # cut off before it had its point

    def trials(self) -> dict[int, Any]:
        """Copies of all trials that have their point, by number: ``params``, and the name of ``state``.

        That is ``RUNNING`` until `conclude`, then ``COMPLETE``, ``PRUNED`` or ``FAIL``.
        """
        keys = self.distributions.keys()
        return {trial.number: trial for trial in self.study.trials if trial.params.keys() == keys}

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
        for attempt in range(DRAW_ATTEMPTS):
            seed = mix(self.seed, len(trials) * DRAW_ATTEMPTS + attempt) % 2**32
            with _quiet():
                sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
                scratch = optuna.create_study(direction="maximize", sampler=sampler)
                scratch.add_trials(trials)
            point = scratch.ask(self.distributions).params
            if point not in taken:
                return point
        raise UsageError(f"{len(taken)} trials: {DRAW_ATTEMPTS} draws found no other point; widen hydra.sweeper.params")

    def conclude(self, number: int, state: str, value: float | None = None) -> None:
        """End a trial as ``COMPLETE`` with its value, ``PRUNED`` or ``FAIL``."""
        from optuna.trial import TrialState

        self.study.tell(number, value, state=TrialState[state])

    def best(self) -> str:
        """The value of the best complete trial and its point, as it is typed in a shell; empty where there is none."""
        if not any(trial.state.name == "COMPLETE" for trial in self.study.trials):
            return ""
        best = self.study.best_trial
        point = shlex.join(redact(f"{key}={best.params[key]}") for key in self.distributions)
        return f"{OBJECTIVE} {best.value:.2f} with {point}"


def should_prune(folder: str | None, number: int | None, epoch: int, metrics: Mapping[str, float]) -> bool:
    """Tell a trial's study how the trial does after an epoch; return whether it lags so far behind as to stop it.

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


def _open(folder: Path, check: bool = False) -> Any:
    """The study in a folder; what there is of it is checked if that is asked for."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path, url = folder / FILE, f"sqlite:///{folder / FILE}"
    try:
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
            raise ValueError("it is a link, or not a regular file")  # where a link leads, a study would be written
        if path.exists() and path.read_bytes()[:16] not in (b"", b"SQLite format 3\0"):  # a short one counts as empty
            raise ValueError("it is not a database")
        storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})
        study = optuna.create_study(storage=storage, study_name="sweep", direction="maximize", load_if_exists=True)
        if check:
            _check(path, study)
    except RuntimeError as error:  # the tables are another Optuna's; it names the command that upgrades them
        raise UsageError(f"{path}: {one_line(error)}".replace("$STORAGE_URL", url)) from None
    except Exception as error:  # whatever is in the file decides what is raised
        raise UsageError(f"{path} is not the study of a sweep ({one_line(error)}): move it away") from None
    return study


def _check(path: Path, study: Any) -> None:
    with closing(sqlite3.connect(path)) as tables:
        (found,) = tables.execute("PRAGMA integrity_check(1)").fetchone()
    if found != "ok":
        raise ValueError(found)
    for trial in study.trials:
        trial._validate()


def _quiet() -> Any:
    """Optuna 2 calls what is used here experimental, and says so each time."""
    return warnings.catch_warnings(action="ignore")
