"""A run's training curves as a picture."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from src.record import METRICS

# A panel's title, and what it shows.
PANELS = {
    "loss": ("train/loss",),
    "validation accuracy (%)": ("val/knn_top1", "val/online_top1"),
    "positives": ("support/label_agreement", "support/self_hit"),
    "entries in use": ("support/perplexity", "support/dead"),
}


def read(directory: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Each metric's steps and values, from the run's ``metrics.jsonl``."""
    curves: dict[str, tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))
    for line in (directory / METRICS).read_text().splitlines():
        row = json.loads(line)
        for key, value in row["metrics"].items():
            curves[key][0].append(row["step"])
            curves[key][1].append(float(value))
    return dict(curves)


def plot(directory: Path) -> Path:
    """Draw ``curves.png`` into the run's directory."""
    from matplotlib.figure import Figure

    curves = read(directory)
    figure = Figure(figsize=(9, 6), layout="constrained")
    for axes, (title, keys) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for key, style in zip(keys, ("-", "--"), strict=False):
            axes.plot(*curves.get(key, ([], [])), style, label=key.split("/")[1])
        axes.set(title=title, xlabel="step")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    path = directory / "curves.png"
    figure.savefig(path, dpi=120)
    return path
