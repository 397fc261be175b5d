"""Make a table and a plot of accuracy against support-set size: ``python -m src.report experiment=NAME``."""

from src import cli

if __name__ == "__main__":
    cli.report()
