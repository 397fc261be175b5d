"""Compute features of any images with a finished run's encoder: ``python -m src.embed run=NAME data=...``."""

from src import cli

if __name__ == "__main__":
    cli.embed()
