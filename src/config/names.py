"""What methods are called in tables and plots, and their colours: Okabe and Ito's, safe for the colour-blind."""

from __future__ import annotations

import re
from collections.abc import Mapping

UNTRAINED = "untrained"  # the encoder before the first step: a row's name, and what its metrics' names begin with
TEACHER = "teacher"  # what the metrics' names of the teacher's encoder begin with
LABELS = {
    "simclr": "SimCLR",
    "nothing_stored": "nothing stored",
    "nnclr": "NNCLR",
    "kmclr": "KMCLR",
    "byol": "BYOL",
    "mnn": "MNN",
    "mnn_prototypes": "MNN, prototypes",
    "relation_nothing": "Relation, nothing stored",
    "relation_queue": "Relation, queue",
    "relation_prototypes": "Relation, prototypes",
}
COLOURS = {
    "simclr": "#404040",
    "nothing_stored": "#999999",
    "nnclr": "#d55e00",
    "kmclr": "#0072b2",
    "byol": "#000000",
    "mnn": "#e69f00",
    "mnn_prototypes": "#56b4e9",
    "relation_nothing": "#666666",
    "relation_queue": "#cc79a7",
    "relation_prototypes": "#009e73",
    UNTRAINED: "#8c6d31",
}
COLOUR = "#[0-9a-fA-F]{6}"
SPARE_COLOURS = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def method_name(objective: str, support: str) -> str:
    """What a loss with a support set is called; a support set from outside this project gives its own name."""
    contrast = {"none": "nothing_stored", "queue": "nnclr", "kmeans": "kmclr"}
    ours = {
        "nt_xent": {"none": "simclr"},
        "mixed": contrast,
        "published": contrast,
        "teacher": {"none": "byol", "queue": "mnn", "kmeans": "mnn_prototypes"},
        "relation": {"none": "relation_nothing", "queue": "relation_queue", "kmeans": "relation_prototypes"},
    }
    return ours[objective].get(support, support)


def label_of(params: Mapping[str, object]) -> str:
    """The label of a run's method, from its params: what its config says, else ours, else its name."""
    name = str(params["method.name"])
    return str(params.get("method.label") or LABELS.get(name, name))


def colour_of(params: Mapping[str, object]) -> str:
    """Its colour, likewise; a method without one gets the same spare one every time."""
    name = str(params["method.name"])
    spare = SPARE_COLOURS[sum(name.encode()) % len(SPARE_COLOURS)]
    own = str(params.get("method.colour", ""))
    return own if re.fullmatch(COLOUR, own) else COLOURS.get(name, spare)


TITLES = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "digits": "scikit-learn's digits",
    "imagenet": "ImageNet",
    "imagenette": "Imagenette",
    "stl10": "STL-10",
    "resnet18": "ResNet-18",
    "resnet34": "ResNet-34",
    "resnet50": "ResNet-50",
    "resnet_tiny": "16-wide ResNet",
}


def title_of(name: str) -> str:
    """A data set's or a backbone's name, for people."""
    return TITLES.get(name, name)
