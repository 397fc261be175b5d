"""Evaluate a finished run's frozen features again: ``python -m src.evaluate checkpoint=PATH`` (or ``run_id=ID``)."""

from src import cli

if __name__ == "__main__":
    cli.evaluate()
