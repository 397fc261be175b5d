"""Evaluate a finished run's frozen features again: ``python -m src.evaluate run=NAME`` (or ``checkpoint=PATH``)."""

from src import cli

if __name__ == "__main__":
    cli.evaluate()
