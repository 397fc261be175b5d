"""The names and colours of methods in tables and plots, most of them from Okabe and Ito's colour-blind safe palette."""

from __future__ import annotations

import re
from collections.abc import Mapping

UNTRAINED = "untrained"  # the encoder before the first step: the name of its row, and the prefix of its metrics
NOT_TRAINED = "not trained here"  # a run without epochs, which evaluates the weights of ``init``: the name of its row
TEACHER = "teacher"  # the prefix of the metrics of the teacher's encoder
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
    NOT_TRAINED: "#882255",
}
COLOUR = "#[0-9a-fA-F]{6}"
SPARE_COLOURS = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def method_name(objective: str, support: str) -> str:
    """The name of the method that an objective and a support set make; a support set from outside gives its own."""
    contrast = {"none": "nothing_stored", "queue": "nnclr", "kmeans": "kmclr"}
    ours = {
        "nt_xent": {"none": "simclr"},
        "mixed": contrast,
        "published": contrast,
        "teacher": {"none": "byol", "queue": "mnn", "kmeans": "mnn_prototypes"},
        "relation": {"none": "relation_nothing", "queue": "relation_queue", "kmeans": "relation_prototypes"},
    }
    return ours[objective].get(support, support)


def trains_nothing(params: Mapping[str, object]) -> bool:
    """Whether a run has no epochs, so that it evaluates the weights of ``init`` as they are."""
    return str(params.get("epochs")) == "0"


def label_of(params: Mapping[str, object]) -> str:
    """The label of a run's method: ``method.label`` of its params, else the built-in label, else the method's name."""
    name = str(params["method.name"])
    return str(params.get("method.label") or LABELS.get(name, name))


def colour_of(params: Mapping[str, object]) -> str:
    """The colour of a run's method, found like `label_of`; an unknown method gets a spare colour, always the same.

    A run that trains nothing has a colour of its own, whatever its method.
    """
    if trains_nothing(params):
        return COLOURS[NOT_TRAINED]
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
    """The name of a data set or a backbone as titles show it."""
    return TITLES.get(name, name)
