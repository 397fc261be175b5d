"""The command line of the scripts in which contenders take turns."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path


def arguments(description: str | None, settings: Collection[str], out: Path) -> argparse.Namespace:
    """What was typed; ``contender`` is for the script's own processes, and None for a user."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="SETTING", help=f"of {', '.join(settings)}; default: all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a turn, at least")
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.settings) - set(settings):
        parser.error(f"{', '.join(unknown)}: choose of {', '.join(settings)}")
    return args
