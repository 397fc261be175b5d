"""A map of vectors in two dimensions by t-SNE, coloured by class.

Shapes: D dimensions, K prototypes, N images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from src.system.output import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_IMAGES = 1000  # images on a map, at most
MAX_NAME_CHARS = 24  # of a class in the legend
COLOURED_CLASSES = 10  # classes with a colour of their own, if there are more than twice as many classes


def choose_images(labels_N: Tensor, classes: int) -> Tensor:
    """Choose images for a map at random: their rows [M].

    If there are more than twenty classes, up to half of the images are of the classes that have their own colours.
    """
    rows_N = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(0)).to(labels_N.device)
    if classes <= 2 * COLOURED_CLASSES:
        return rows_N[:MAX_IMAGES]
    is_named_N = (labels_N[rows_N] >= 0) & (labels_N[rows_N] < COLOURED_CLASSES)
    named, others = rows_N[is_named_N][: MAX_IMAGES // 2], rows_N[~is_named_N]
    return torch.cat([others[: MAX_IMAGES - len(named)], named])


def draw_map(x_ND: Tensor, labels_N: Tensor, classes: Sequence[str], prototypes_KD: Tensor | None = None) -> Figure:
    """Draw vectors in two dimensions by t-SNE, coloured by class; prototypes are black crosses.

    Of more than twenty classes, the first ten have colours and the others are grey. Vectors without a label have
    label -1.

    Source: van der Maaten and Hinton, "Visualizing Data using t-SNE", JMLR 2008.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    everything = torch.cat([x_ND, *([] if prototypes_KD is None else [prototypes_KD.to(x_ND)])]).cpu().numpy()
    perplexity = min(30, max(1, (len(everything) - 1) // 3))
    start = "pca" if (everything != everything[0]).any() else "random"  # equal vectors have no principal component
    places = TSNE(perplexity=perplexity, init=start, max_iter=500, random_state=0).fit_transform(everything)
    points, marks = places[: len(x_ND)], places[len(x_ND) :]
    labels = labels_N.cpu().numpy()
    figure = Figure(figsize=(6.4, 5), layout="constrained")
    axes = figure.subplots()
    named = len(classes) if len(classes) <= 2 * COLOURED_CLASSES else COLOURED_CLASSES
    for here, what in ((labels < 0, "no label"), (labels >= named, f"the other {len(classes) - named} classes")):
        if here.any():
            axes.scatter(points[here, 0], points[here, 1], s=6, color="0.82", linewidth=0, label=what)
    palette = colormaps["tab10" if named <= COLOURED_CLASSES else "tab20"]
    for label in range(named):
        here = labels == label
        if here.any():
            axes.scatter(
                points[here, 0],
                points[here, 1],
                s=14,
                color=palette(label),
                linewidth=0,
                label=class_text(classes[label], MAX_NAME_CHARS),
            )
    if len(marks):
        axes.scatter(marks[:, 0], marks[:, 1], s=18, marker="x", color="black", linewidth=0.8, label="prototypes")
    axes.set(xticks=[], yticks=[], title=f"{len(x_ND):,} images by t-SNE")
    axes.spines[:].set_color("0.8")
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), markerscale=1.4)
    return figure


def class_text(name: str, max_chars: int | None = None) -> str:
    """A class's name for a picture: without underscores, control characters and Matplotlib's formulas."""
    return printable(name).replace("_", " ")[:max_chars].replace("$", r"\$")
