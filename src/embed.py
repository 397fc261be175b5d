"""Features of any images by a finished run's encoder, and a map of them: ``python -m src.embed run=NAME data=...``."""

from src import cli

if __name__ == "__main__":
    cli.embed()
