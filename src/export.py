"""A finished run's encoder in a format of others: ``python -m src.export run=NAME format=pt2|onnx|timm|hf``."""

from src import cli

if __name__ == "__main__":
    cli.export()
