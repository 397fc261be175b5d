"""A table and a plot of support-set size against accuracy: ``python -m src.report experiment=NAME``."""

from src import cli

if __name__ == "__main__":
    cli.report()
