"""The command line: Hydra composes, and a user's mistake ends in one line and status 2."""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import hydra
import omegaconf
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from src import config, sweep
from src.errors import RunFailed, UsageError
from src.launcher import JobFailed
from src.redact import redact
from src.stopping import Stopped

LONGEST = 600  # characters of a line for people
CONF = Path(__file__).parent.parent / "conf"


def run(module: str, config_name: str) -> None:
    """Hand the composed config to ``main`` of a module, as ``hydra.main`` does, but explain mistakes to people.

    The module is imported when the config has been composed, so that ``--help`` does not wait for torch. A user who
    sets ``HYDRA_FULL_ERROR=1`` gets the tracebacks.
    """
    sweep.register()
    if {"--multirun", "-m"} & set(sys.argv):
        # A choice of one. As a plain value Hydra would also give it to the default method, which may not have it.
        sys.argv[1:] = [
            re.sub(rf"^({'|'.join(config.SUPPORT_KEYS.values())})=(\w+)$", r"\1=choice(\2)", a) for a in sys.argv[1:]
        ]
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)

    def task(composed: DictConfig) -> Any:
        if HydraConfig.get().mode == RunMode.MULTIRUN:  # the sweeper collects how its jobs end
            return _job(module, composed)
        if "sweep" in HydraConfig.get().runtime.choices and not composed.tracking.parent:
            fail(f"+sweep={HydraConfig.get().runtime.choices['sweep']}: a sweep is many runs; add --multirun")
        with _explained():  # here, because Hydra would print a line of its own first
            return importlib.import_module(module).main(composed)

    base = {"version_base": "1.3"} if hydra.__version__.startswith("1.3") else {}  # 1.4 has no other, and says so
    main = hydra.main(**base, config_path=str(CONF), config_name=config_name)(task)
    if os.environ.get("HYDRA_FULL_ERROR", "0") != "0":
        main()
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's own reporting would hide the exception from us
    try:
        with _explained():
            main()
    except KeyboardInterrupt:  # before a run could take it for a request to stop
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if not _is_from_hydra(error):
            raise
        fail(explain(str(error)))


def _is_from_hydra(error: Exception) -> bool:
    """Of a line that Hydra cannot compose it may raise anything: a TypeError for ``tracking=[1]``."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return any(raised_in.is_relative_to(Path(package.__path__[0])) for package in (hydra, omegaconf))


@contextmanager
def _explained() -> Iterator[None]:
    """Ends with one line and a status where the fault is not in the program."""
    try:
        yield
    except UsageError as error:
        fail(str(error))
    except RunFailed as failure:
        fail(str(failure), failure.status)
    except (HydraException, OmegaConfBaseException) as error:  # one of Hydra's is an OSError too
        fail(explain(str(error)))
    except OSError as error:  # before a run had its directory: nothing has been written
        fail(f"{error.filename or 'a file'}: {error.strerror or error}")


def _job(module: str, composed: DictConfig) -> Any:
    try:
        return importlib.import_module(module).main(composed)
    except Stopped as end:  # launchers carry exceptions, but would end with this one
        raise JobFailed("stopped; the same command continues", int(end.code or 0)) from None
    except RunFailed as failure:
        raise JobFailed(str(failure), failure.status) from None


def fail(message: str, status: int = 2) -> NoReturn:
    """Print one line, without secrets, and end with the status."""
    print(f"error: {redact(' '.join(message.split()))[:LONGEST]}", file=sys.stderr)
    sys.exit(status)


def explain(message: str) -> str:
    """One line that says what Hydra's several say, and what to do."""
    if re.search(r"Could not (find|load) 'hydra/launcher/submitit_(slurm|local)'", message):
        return "hydra/launcher: SLURM needs submitit: pip install --constraint constraints.txt '.[slurm]'"
    if "hydra_plugins.hydra_ray_launcher" in message:
        return (
            "hydra/launcher=ray: needs Ray and its launcher: pip install --constraint constraints.txt '.[ray]' && "
            "pip install --no-deps hydra-ray-launcher==1.2.2"
        )
    if missing := re.search(r"Could not find '([\w./-]+)/([^']*)'", message):
        group, option = missing.groups()
        options = re.findall(r"^\t(\S+)$", message, re.MULTILINE)
        return f"{group}={option}: there is no such option; choose one of {', '.join(options)}"
    if unknown := re.search(r"Could not (?:override|append to config)[^']*'([\w.@/-]+)'", message):
        return _unknown_key(unknown.group(1))
    if several := re.search(r"Ambiguous value for argument '([^']+)'", message):
        return f"{several.group(1)}: several values; add --multirun to run each of them"
    return f"{message.splitlines()[0]} (--help shows what can be set)"


def _unknown_key(key: str) -> str:
    for method, root_key in config.SUPPORT_KEYS.items():
        if key == root_key:
            others = [f"method={name} has {other}" for name, other in config.SUPPORT_KEYS.items() if name != method]
            return f"{key}: only method={method} has it ({', '.join(others)}; simclr stores nothing)"
    group, _, setting = key.partition(".")
    if setting and key in known_keys():
        return f"{key}: the chosen options do not have it; choose {group}=... first (--help lists them)"
    near = difflib.get_close_matches(key, [each for each in known_keys() if each != key], n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{key}: unknown key, or one that the chosen options do not have; {hint}(--help shows what can be set)"


def known_keys() -> list[str]:
    """Every dotted key that some composition can have."""
    keys: list[str] = []

    def visit(prefix: str, schema: type) -> None:
        hints = get_type_hints(schema)
        for each in fields(schema):
            key = f"{prefix}{each.name}"
            keys.append(key)
            kinds = config.METHODS.values() if key == "method" else [hints[each.name]]
            for kind in kinds:
                if is_dataclass(kind):
                    visit(f"{key}.", kind)

    visit("", config.Config)
    return list(dict.fromkeys(keys))
