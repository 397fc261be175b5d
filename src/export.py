"""Export a finished run's encoder for other software: ``python -m src.export run=NAME format=pt2|onnx|timm|hf``."""

from src import cli

if __name__ == "__main__":
    cli.export()
