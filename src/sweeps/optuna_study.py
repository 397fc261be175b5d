"""A search over settings by Optuna, kept in ``study.db`` in its sweep's folder. The only file that imports optuna.

Unlike with hydra-optuna-sweeper, the same command continues to the same total of trials, a seeded sampler does not
repeat itself, configurations are distinct, an interrupted trial is taken up again, and hopeless trials are pruned.
"""

from __future__ import annotations

import logging
import os
import shlex
import sqlite3
import tempfile
import warnings
from collections.abc import Callable, Container, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override, Transformer
from hydra.errors import HydraException

from src.errors import UsageError
from src.sweeps.jobs import OBJECTIVE
from src.system.redact import one_line, redact
from src.system.seeding import mix

PRUNERS = ("median", "halving", "none")
FILE = "study.db"
DRAW_ATTEMPTS = 100  # of each sampler, to find a point that is new

logger = logging.getLogger(__name__)


def space(overrides: Mapping[str, Override], whole: Container[str]) -> dict[str, Any]:
    """Turn overrides that sweep (choices, ``range``, ``interval``, ``tag(log, interval)``) into Optuna's distributions.

    As everywhere in Hydra, a ``range`` excludes its end.

    Args:
        overrides: the overrides by their keys; those that do not sweep are left out of the result.
        whole: the keys of integer settings, for which an interval gives integers.

    Raises:
        UsageError: Optuna cannot draw from one of the overrides.
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
    swept.shuffle = False  # a draw needs no order, and a search is found again by its distributions
    values: list[Any] = list(override.sweep_iterator(Transformer.encode))
    if not values:
        raise ValueError("it is empty")
    if override.is_range_sweep() and not isinstance(values[0], str):  # strings: str(range(3)), since Hydra 1.4
        return numbers(min(values), max(values), type(values[0])(abs(swept.step)) or 1)
    return CategoricalDistribution(values)


def numbers(low: float, high: float, step: float | None = None, log: bool = False) -> Any:
    """A distribution of the numbers from low to high, both included; of integers if low is an integer."""
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
    """A point of the space as overrides: the lowest number or the first choice of each key."""
    return [f"{key}={each.low if hasattr(each, 'low') else each.choices[0]}" for key, each in space.items()]


class Study:
    """The trials of a search, each with a point in the space; one process at a time proposes and concludes them.

    Args:
        folder: the sweep's folder.
        distributions: the result of `space`.
        pruner: one of `PRUNERS`; None: the study is only read, and changes nothing in the folder.
        seed: proposals are a function of the seed and of the earlier trials.
    """

    def __init__(self, folder: Path, distributions: Mapping[str, Any], pruner: str | None, seed: int) -> None:
        self.folder, self.distributions, self.seed, self.objective = folder, dict(distributions), seed, OBJECTIVE
        self.study = _open(folder, check=True, read=pruner is None)
        if pruner is None:
            return
        self.study.set_user_attr("pruner", pruner)
        for trial in self.study.trials:
            if trial.state.name == "RUNNING" and trial.params.keys() != self.distributions.keys():
                self.conclude(trial.number, "FAIL")  # interrupted before its point was drawn

    def trials(self) -> dict[int, Any]:
        """Copies of all trials that have a point, by number, with the point in ``params``.

        The name of ``state`` is ``RUNNING`` until `conclude`, then ``COMPLETE``, ``PRUNED`` or ``FAIL``.
        """
        keys = self.distributions.keys()
        return {trial.number: trial for trial in self.study.trials if trial.params.keys() == keys}

    def propose(self, is_new: Callable[[Mapping[str, Any]], bool] = lambda _: True) -> int:
        """Begin a new trial at a point that no other trial has, and return its number.

        The point is drawn in a copy of the study and enqueued before the trial begins, so that a kill leaves behind
        either a trial with its point or no trial.

        Args:
            is_new: whether a point that no other trial has is also another configuration.

        Raises:
            UsageError: no other point was found.
        """
        with _quiet():
            if not any(trial.state.name == "WAITING" for trial in self.study.trials):
                self.study.enqueue_trial(self._draw(is_new))
            return self.study.ask(self.distributions).number

    def _draw(self, is_new: Callable[[Mapping[str, Any]], bool]) -> dict[str, Any]:
        import optuna

        trials = self.study.trials
        taken = [trial.params for trial in trials]
        seed = mix(self.seed, len(trials) * DRAW_ATTEMPTS) % 2**32
        with _quiet():
            by_values = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
            at_random = optuna.samplers.RandomSampler(seed=seed)  # if the former only draws what is known to be good
            scratch = optuna.create_study(direction="maximize")
            scratch.add_trials(trials)
            for sampler in (by_values, at_random):
                scratch.sampler = sampler
                for _ in range(DRAW_ATTEMPTS):
                    point = scratch.ask(self.distributions).params
                    if point not in taken and is_new(point):
                        return point
        raise UsageError(f"{len(taken)} trials: {DRAW_ATTEMPTS} draws found no other point; widen hydra.sweeper.params")

    def conclude(self, number: int, state: str, value: float | None = None) -> None:
        """End a trial as ``COMPLETE``, with its value, or as ``PRUNED`` or ``FAIL``."""
        from optuna.trial import TrialState

        self.study.tell(number, value, state=TrialState[state])

    def reopen(self, numbers: Container[int]) -> None:
        """Begin ended trials again. Optuna changes none, so a copy, where they are new, replaces the study."""
        from optuna.trial import FrozenTrial, TrialState, create_trial

        def renewed(trial: FrozenTrial) -> FrozenTrial:
            if trial.number not in numbers:
                return trial
            return create_trial(state=TrialState.RUNNING, params=trial.params, distributions=trial.distributions)

        with _quiet(), tempfile.TemporaryDirectory(prefix=f"{FILE}.", dir=self.folder) as aside:
            copy = _open(Path(aside))
            for key, value in self.study.user_attrs.items():
                copy.set_user_attr(key, value)
            trials = _open(self.folder).trials  # `self.study` may not know what the jobs of finished trials reported
            copy.add_trials(map(renewed, trials))  # in their order, so that they keep their numbers
            os.replace(Path(aside) / FILE, self.folder / FILE)
        self.study = _open(self.folder)

    def best(self, skipped: Mapping[int, Container[str]]) -> str:
        """The value and the settings of the best complete trial, as typed in a shell; empty if there is none.

        Args:
            skipped: by the numbers of the trials to be compared, the keys of their points that have no effect.
        """
        complete = [each for each in self.trials().values() if each.number in skipped and each.state.name == "COMPLETE"]
        if not complete:
            return ""
        best = max(complete, key=lambda trial: trial.value)
        keys = [key for key in self.distributions if key not in skipped[best.number]]
        point = shlex.join(redact(f"{key}={best.params[key]}") for key in keys)
        return f"{OBJECTIVE} {best.value:.2f} with {point}"


def should_prune(folder: str | None, number: int | None, epoch: int, metrics: Mapping[str, float]) -> bool:
    """Report a trial's metric after an epoch to its study; return whether it lags so far behind that it should stop.

    The answer is no for a run outside a search, after an epoch without the metric, and if the study does not answer.

    Args:
        folder: the sweep's folder; None: the run belongs to no sweep. It is not here if a trial's recorded command is
            typed elsewhere.
        number: the number of the trial; None: the run is not a trial.
        epoch: how many epochs have been trained.
        metrics: those that were logged after this epoch.
    """
    if folder is None or number is None or OBJECTIVE not in metrics or not Path(folder).is_dir():
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
            trial.report(metrics[OBJECTIVE], epoch)  # repeated after a resume, it counts only once
        return trial.should_prune()
    except Exception as error:
        logger.warning("the study in %s does not answer, so nothing is pruned: %s", folder, error)
        return False


def _open(folder: Path, check: bool = False, read: bool = False) -> Any:
    """Open the study in a folder, or create it unless it is only to be read; with ``check``, look for damage in it."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path, url = folder / FILE, f"sqlite:///{folder / FILE}"
    try:
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
            raise ValueError("it is a link, or not a regular file")  # a study would be written to where a link leads
        if path.exists() and path.read_bytes()[:16] not in (b"", b"SQLite format 3\0"):
            raise ValueError("it is not a database")  # SQLite itself would take a single byte for an empty one
        storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})
        if read:
            study = optuna.load_study(storage=storage, study_name="sweep")
        else:
            study = optuna.create_study(storage=storage, study_name="sweep", direction="maximize", load_if_exists=True)
        if check:
            _check(path, study)
    except RuntimeError as error:  # the tables are of another Optuna; the message names the command that upgrades them
        raise UsageError(f"{path}: {one_line(error)}".replace("$STORAGE_URL", url)) from None
    except Exception as error:  # which exception is raised depends on the file's content
        raise UsageError(f"{path} is not the study of a sweep ({one_line(error)}): move it away") from None
    return study


def _check(path: Path, study: Any) -> None:
    """Raise an exception if the database or a trial in it is damaged."""
    with closing(sqlite3.connect(path)) as tables:
        (found,) = tables.execute("PRAGMA integrity_check(1)").fetchone()
    if found != "ok":
        raise ValueError(found)
    with _quiet():
        for trial in study.trials:
            trial._validate()


def _quiet() -> Any:
    """Ignore warnings inside this block, because Optuna 2 warns each time that what is used here is experimental."""
    return warnings.catch_warnings(action="ignore")
