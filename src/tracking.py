"""Deliver to MLflow whatever it still lacks of the runs in ``multirun/``: ``python -m src.tracking``."""

from src import cli

if __name__ == "__main__":
    cli.deliver()
