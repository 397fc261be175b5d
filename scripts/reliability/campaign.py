"""What all campaigns share: their command line, and the verdict at their end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NoReturn


def campaign(
    description: str | None, main: Callable[..., list[str]], names: Collection[str] = (), **numbers: int
) -> NoReturn:
    """Run a campaign as a command. The exit status is 1 if something went wrong, else 0.

    Args:
        description: what ``--help`` prints.
        main: takes ``folder`` and the arguments below by their names; returns what went wrong.
        names: the values of the argument ``names``, of which a user may choose some.
        numbers: the names of the arguments that are whole numbers, and their defaults.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", metavar="FOLDER", type=lambda path: Path(path).resolve(), help="not another campaign's"
    )
    for name, default in numbers.items():
        parser.add_argument(
            name, metavar=name.upper(), type=int, nargs="?", default=default, help="by default %(default)s"
        )
    if names:
        parser.add_argument("names", metavar="NAME", nargs="*", help=f"{', '.join(names)}; by default all")
    given = vars(parser.parse_args())
    if names:
        given["names"] = given["names"] or list(names)
        if unknown := [name for name in given["names"] if name not in names]:  # `choices` would refuse no name at all
            parser.error(f"{unknown[0]}: choose from {', '.join(names)}")
    wrong = main(**given)
    print(f"what went wrong: {wrong or 'nothing'}")
    sys.exit(bool(wrong))


def judged(outcome: str, is_right: bool) -> list[str]:
    """Print an outcome, and return it as a fault unless it is right."""
    print(outcome, flush=True)
    return [] if is_right else [outcome]
