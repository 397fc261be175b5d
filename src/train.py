"""Pre-train an encoder and evaluate its frozen features: ``python -m src.train method=kmclr k=400``."""

from src import cli

if __name__ == "__main__":
    cli.train()
