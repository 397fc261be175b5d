"""The command line: Hydra composes the config, and a user's mistake ends with one line and exit status 2.

The code of a command is imported only after its config is composed, so that ``--help`` does not wait for torch.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import hydra
import omegaconf
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from src.config import resolvers
from src.config.chosen import settle
from src.config.explain import explain_composition, keys_of
from src.config.parse import parse
from src.config.renamed import new_name
from src.data.cache import known_fingerprint
from src.errors import RunFailed, UsageError
from src.runs import origin
from src.sweeps import plugins
from src.sweeps.dry_run import preview
from src.sweeps.jobs import SWEEP_KEYS
from src.sweeps.launcher import FOREIGN
from src.system.environment import CONF, PROJECT, is_rank
from src.system.output import lost_output, outlive_output, printable
from src.system.redact import one_line, redact, redact_output

# An argument of `hydra.main`: Hydra 1.4 has a single version base, and warns if one is given.
VERSION_BASE: dict[str, str] = {"version_base": "1.3"} if hydra.__version__.startswith("1.3") else {}
MAX_MESSAGE_CHARS = 600  # in the line of an error
_LACKS_MEMORY = re.compile(
    "MemoryError|out of memory|(can't|cannot) allocate memory|size calculation overflowed|bad_alloc|"
    "failed to map segment|can't start new thread",
    re.I,
)
os.environ.pop("MPLBACKEND", None)  # pictures go to files, and matplotlib fails to import with an unknown back end


@contextmanager
def _survives_closed_output() -> Iterator[None]:
    """Exit with the status of SIGPIPE if the reader of standard output has gone, and with 74 if the disk is full.

    Ctrl-C ends the command with the status of SIGINT, without a traceback.
    """
    outlive_output()
    try:
        yield
    except KeyboardInterrupt:  # outside a run; inside, Ctrl-C is a request to stop
        sys.exit(128 + signal.SIGINT)
    if sys.stdout is not None:
        sys.stdout.flush()
    if lost := lost_output():
        sys.exit(lost)


@_survives_closed_output()
def train() -> None:
    """``python -m src.train``."""

    def main(composed: DictConfig) -> float:
        settle(composed, HydraConfig.get(), GlobalHydra.instance().config_loader())
        return pretrain(composed)

    _compose_and_run("train", main)


@_survives_closed_output()
def evaluate() -> None:
    """``python -m src.evaluate``."""

    def main(composed: DictConfig) -> dict[str, float]:
        from src.evaluation import evaluate

        return evaluate.main(composed)

    _compose_and_run("evaluate", main)


@_survives_closed_output()
def export() -> None:
    """``python -m src.export``."""

    def main(composed: DictConfig) -> Path:
        from src.evaluation import export

        return export.main(composed)

    _compose_and_run("export", main)


@_survives_closed_output()
def embed() -> None:
    """``python -m src.embed``."""
    _compose_and_run("embed", features)


@_survives_closed_output()
def report() -> None:
    """``python -m src.report``."""
    _refuse_ranks("report")
    from src.reporting import report  # imported here, because matplotlib takes a second

    with explained():
        _log_to_stderr()
        report.main(sys.argv[1:])


@_survives_closed_output()
def deliver() -> None:
    """``python -m src.tracking``."""
    _refuse_ranks("tracking")
    from src.reporting import mlflow_charts
    from src.runs import delivery

    with explained():
        _log_to_stderr()
        delivery.main(mlflow_charts.publish_again)


def pretrain(composed: DictConfig) -> float:
    """Train the run of a composed config; returns its last ``val/knn_top1`` (`src.training.run.run`), NaN if dry."""
    cfg = parse(composed)
    if cfg.dry_run:
        cfg.data.fingerprint = known_fingerprint(cfg.data) or cfg.data.fingerprint
        origin.identify(cfg)
        print(preview([cfg], at_a_time=1))
        return math.nan
    from src.reporting import curves, pictures
    from src.sweeps import optuna_study
    from src.training.loop import Hooks
    from src.training.run import run

    return run(cfg, Hooks(curves.plot, pictures.illustrate, optuna_study.should_prune))


def features(composed: DictConfig) -> Path:
    """Write features of images from a finished run's encoder, and a map of them (`src.evaluation.embed.main`)."""
    from src.evaluation import embed
    from src.reporting import map as maps

    return embed.main(composed, maps.choose_images, maps.draw_map)


def _compose_and_run(config_name: str, main: Callable[[DictConfig], Any]) -> None:
    """Compose the config and pass it to ``main``, as ``hydra.main`` does, but report mistakes in one line.

    With ``HYDRA_FULL_ERROR=1`` in the environment, the user gets tracebacks instead.
    """
    trains = config_name == "train"
    plugins.register()
    resolvers.register("options", _options)
    _refuse_mistyped(config_name)
    _refuse_hidden_files()
    if {"--multirun", "-m"} & set(sys.argv):
        sys.argv[1:] = [_for_the_sweeper(argument) for argument in sys.argv[1:]]
    known = None if trains else keys_of(yaml.safe_load((CONF / f"{config_name}.yaml").read_text()))
    _log_to_stderr()

    def task(composed: DictConfig) -> Any:
        _refuse_misplaced(composed, trains)
        with explained():  # here, because Hydra would print a line of its own first
            return main(composed)

    hydra_main = hydra.main(**VERSION_BASE, config_path=str(CONF), config_name=config_name)(task)
    tracebacks = os.environ.get("HYDRA_FULL_ERROR", "0") != "0"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's own reporting would hide the exception from us
    try:
        with nullcontext() if tracebacks else explained(known):
            _with_renamed_keys(hydra_main)
    except Exception as error:
        if tracebacks or not _is_from_hydra(error):
            raise
        fail(explain_composition(error, known))


def _refuse_mistyped(config_name: str) -> None:
    """Refuse a command line that Hydra would misunderstand, or would refuse with an unhelpful message."""
    typed = sys.argv[1:]
    if empty := {"", "run=", "checkpoint=", "run_id="}.intersection(typed):
        fail(f"{max(empty) or 'an argument'} is empty: a variable of the shell may have no value")
    settings = [place for place, argument in enumerate(typed) if "=" in argument and argument[0] != "-"]
    between = typed[settings[0] : settings[-1]] if settings else []
    if any(argument[0] == "-" for argument in between):  # argparse would not recognise the settings after it
        fail("settings stand before and after an argument that begins with a hyphen: put that first")
    if config_name != "train":
        _refuse_ranks(config_name)
    if is_rank() and {"--multirun", "-m"}.intersection(typed):
        fail("--multirun: a sweep starts its jobs itself; leave out torchrun, which is for one run")
    for argument in typed:
        # Refused here, because Hydra makes this folder before it passes the config on.
        if re.match(r"\+*hydra\.run\.dir=", argument) and "hydra.job.chdir=true" not in typed:
            fail(f"{argument}: has no effect; a run's folder is output_dir")
        if argument.endswith("=null") and os.path.isdir(CONF / argument.removesuffix("=null")):
            fail(f"{argument}: choose an option (--help lists them), or leave it out")


def _refuse_hidden_files() -> None:
    """Refuse files of ``--config-dir`` that Hydra would never read, because it looks into ``conf/`` first."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--config-path", "-cp")  # replaces conf/ as the first
    given = parser.parse_known_args()[0]
    if not given.config_dir or given.config_path:
        return
    for path in sorted(CONF.rglob("*.yaml")):
        theirs = Path(given.config_dir) / path.relative_to(CONF)
        if theirs.is_file() and not theirs.samefile(path):
            fail(f"{theirs}: is never read, because the project has a file of this name; rename it")


def _refuse_misplaced(composed: DictConfig, trains: bool) -> None:
    """Refuse options that belong to another command, or to a sweep if this is a single run."""
    chosen = HydraConfig.get()
    choices, is_sweep = chosen.runtime.choices, chosen.mode == RunMode.MULTIRUN
    if trains and "method" not in choices:
        fail(f"--config-name={chosen.job.config_name}: configures no training run; build on train.yaml")
    if trains and is_sweep:  # a launcher that runs jobs in this process, for a sweeper of Hydra or of a plugin
        fail(f"hydra/launcher={choices['hydra/launcher']}: {FOREIGN}")
    if "sweep" in choices and not composed.tracking.parent:
        fail(f"+sweep={choices['sweep']}: a sweep is many runs; add --multirun")
    if trains and not is_sweep and choices["hydra/launcher"] != "local":
        fail(f"hydra/launcher={choices['hydra/launcher']}: submits the jobs of a sweep; add --multirun, for one too")


def _refuse_ranks(module: str) -> None:
    if is_rank():
        fail(f"src.{module}: works in one process; leave out torchrun, which is for src.train")


def _options(*groups: str) -> str:
    """List each group's options in a line of its own for ``--help``, including those from ``--config-dir``."""
    options = GlobalHydra.instance().config_loader().get_group_options
    return "\n".join(f"{group}: {', '.join(sorted(options(group.lstrip('+'))))}" for group in groups)


def _log_to_stderr() -> None:
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    logging.getLogger("src").setLevel(logging.INFO)  # shows the progress of downloads and decoding
    redact_output()


def _for_the_sweeper(argument: str) -> str:
    """Rewrite ``key=value`` as ``key=choice(value)``.

    Hydra sets a plain value in the sweep's own config, where the default method may lack the key; it leaves a choice to
    the sweeper, which sets the key in each job. Options of groups, keys of the sweep, added and deleted keys, and null
    stay as typed.
    """
    key, _, value = argument.partition("=")
    is_group = "/" in key or os.path.isdir(CONF / key)  # unlike Path.is_dir, this accepts a name of any length
    if argument[0] in "-+~" or is_group or key.split(".")[0] in ("hydra", *SWEEP_KEYS) or not value:
        return argument
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:  # Hydra reports this mistake itself, with a better message
        return argument
    is_choice_already = override.is_sweep_override() or override.value() is None  # there is no choice(null)
    return argument if is_choice_already else f"{key}=choice({value})"


def _with_renamed_keys(hydra_main: Callable[[], None]) -> None:
    """Compose and run. If a given key does not exist because it has been renamed, try again with its new name."""
    while True:
        try:
            return hydra_main()
        except HydraException as error:
            lacking = re.search(r"Could not override '([\w.]+)'", str(error))
            old = lacking[1] if lacking else ""
            new = new_name(old)
            if new is None:
                raise
            sys.argv[1:] = [re.sub(rf"^{re.escape(old)}=", f"{new}=", argument) for argument in sys.argv[1:]]


def _is_from_hydra(error: Exception) -> bool:
    """Whether an error means that Hydra could not compose the config.

    Hydra may raise anything: a TypeError for ``tracking=[1]``, an error of YAML for a file.
    """
    frames = traceback.extract_tb(error.__traceback__)
    raised_in = Path(frames[-1].filename)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(PROJECT / "src")]
    is_composing = not ours or ours[-1].name == _with_renamed_keys.__name__
    return is_composing or any(raised_in.is_relative_to(Path(package.__path__[0])) for package in (hydra, omegaconf))


@contextmanager
def explained(known: Collection[str] | None = None) -> Iterator[None]:
    """Exit with one line and a status on an error that is not a fault of the program.

    ``known`` is passed on to `explain_composition`.
    """
    try:
        yield
    except Exception as error:
        if lacking := _lack_of_memory(error):
            fail(f"there is not enough memory ({one_line(lacking)}): lower the largest setting, or use more memory", 1)
        if isinstance(error, RunFailed):
            fail(str(error), error.status)
        if isinstance(error, UsageError | HydraException | OmegaConfBaseException):  # one of Hydra's is an OSError too
            fail(explain_composition(error, known))
        if isinstance(error, RuntimeError) and "Symlink loop" in str(error):  # an OSError since Python 3.13
            fail(f"{error}: name another folder")
        if isinstance(error, OSError):  # the run has no directory yet, so nothing has been written
            fail(f"{error.filename or 'a file'}: {error.strerror or error}")
        raise


def _lack_of_memory(error: BaseException | None) -> BaseException | None:
    """Find the error that reports a lack of memory, in an error or its context; any library may run into the limit."""
    kinds = MemoryError | RuntimeError | ImportError | OSError
    while error and not (isinstance(error, kinds) and _LACKS_MEMORY.search(repr(error))):
        error = error.__context__
    return error


def fail(message: str, status: int = 2) -> NoReturn:
    """Print the message as one line without secrets, and exit with the status."""
    if _is_first_rank_to_report():
        print(f"error: {printable(redact(' '.join(message.split())))[:MAX_MESSAGE_CHARS]}", file=sys.stderr)
    sys.exit(status)


def _is_first_rank_to_report() -> bool:
    """Whether this is the first process of a run to report an error; the others stay silent."""
    if not is_rank():
        return True
    from src.training.distributed import is_first_to_say

    return is_first_to_say()
