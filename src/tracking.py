"""Deliver to MLflow what it lacks of the runs below ``multirun/``: ``python -m src.tracking``."""

from src import cli

if __name__ == "__main__":
    cli.deliver()
