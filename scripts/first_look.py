"""Does everything learn? Trains the three methods on 20,000 CIFAR-100 images for 20 epochs and draws their curves.

    python -m scripts.first_look data.root=DIR

Arguments go to every run. Finished runs are not repeated, so the picture can be drawn again at no cost. Writes
results/first_look/{curves.png,curves.json,README.md}.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from src import curves
from src.record import Record

METHODS = {
    "SimCLR": ["method=simclr"],
    "NNCLR 4,096": ["method=nnclr", "queue_size=4096"],
    "KMCLR 400": ["method=kmclr", "k=400"],
}
SETTINGS = [
    "backbone=resnet_tiny",
    "data.limit=20000",
    "epochs=20",
    "optimizer=sgd",
    "schedule.warmup_epochs=2",
    "evaluation.every=2",
    "checkpoint.every=2",
]
OUT = Path("results/first_look")
SHOWN = {
    "loss": "train/loss",
    "validation kNN top-1 (%)": "val/knn_top1",
    "online linear top-1 (%)": "val/online_top1",
}


def command(method: list[str]) -> list[str]:
    """What a user would type, without the interpreter."""
    return ["-m", "src.train", *method, *SETTINGS]


def main(extra: list[str]) -> None:
    """Train what is not finished, then draw and tabulate."""
    runs = {}
    for label, method in METHODS.items():
        output = f"multirun/first_look-{method[0].split('=')[1]}"
        subprocess.run([sys.executable, *command(method), f"output_dir={output}", *extra], check=True)
        runs[label] = Path(output)
    OUT.mkdir(parents=True, exist_ok=True)
    read = {label: curves.read(directory) for label, directory in runs.items()}
    figure(read).savefig(OUT / "curves.png", dpi=120)
    kept = {label: {key: each[key] for key in SHOWN.values() if key in each} for label, each in read.items()}
    (OUT / "curves.json").write_text(json.dumps(kept) + "\n")
    (OUT / "README.md").write_text(summary({label: Record.load(path) for label, path in runs.items()}))
    print(OUT / "curves.png")


def figure(read: dict[str, dict[str, Any]]) -> Figure:
    """One panel a metric, one line a method."""
    picture = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (title, key) in zip(picture.subplots(1, len(SHOWN)), SHOWN.items(), strict=True):
        for (label, each), style, colour in zip(read.items(), ("--", "-.", "-"), ("C7", "C1", "C0"), strict=True):
            axes.plot(*each[key], style, color=colour, label=label)
        axes.set(xlabel="step", title=title)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return picture


def summary(records: dict[str, Record]) -> str:
    """The figures, how they came about, and on what."""
    head = [
        "method",
        "untrained kNN",
        "val kNN",
        "gain",
        "val linear",
        "test linear top-1",
        "test kNN",
        "train seconds",
    ]
    rows = [head, ["---"] * len(head)]
    for label, record in records.items():
        each = curves.read(Path(record.tags["output_dir"]))
        before, after = each["val/knn_top1"][1][0], record.metrics["val/knn_top1"]
        figures = [record.metrics[key] for key in ("val/linear_top1", "test/linear_top1", "test/knn_top1")]
        seconds = sum(each["time/epoch_seconds"][1])
        columns = [f"{before:.1f}", f"{after:.1f}", f"{after / before:.2f}x", *(f"{f:.1f}" for f in figures)]
        rows.append([label, *columns, f"{seconds:.0f}"])
    tags = next(iter(records.values())).tags
    versions = ", ".join(f"{key} {tags[key]}" for key in ("python", "torch", "torchvision", "device") if key in tags)
    lines = [
        "# Does everything learn?",
        "",
        "20,000 real CIFAR-100 images, 20 epochs, a 16-wide ResNet, one seed; top-1 in percent. `untrained kNN` is the",
        "encoder's before its first step, `gain` the ratio of `val kNN` to it. One seed at this budget ranks nothing.",
        "",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        "![curves](curves.png)",
        "",
        f"Commit {tags.get('git_commit', 'unknown')[:10]}, {versions}. The machine was shared: the times say little.",
        "",
        "    python -m scripts.first_look data.root=DIR",
        "",
        *(f"    python {shlex.join(command(method))} data.root=DIR" for method in METHODS.values()),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
