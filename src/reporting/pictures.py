"""Pictures of a support set: anchors beside their positives, prototypes beside their members, and a map.

Images pass without augmentation through the network in evaluation mode. Nothing here changes the run or its random
numbers.

Shapes: A anchors, D dimensions, N images of a sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from src.data import Dataset
from src.data.decoding import UNLABELLED
from src.data.splits import Split
from src.evaluation.embed import MIN_MAP_IMAGES
from src.evaluation.positives import project
from src.evaluation.probes import FrozenEncoder
from src.methods.base import Method
from src.reporting.map import choose_images, class_text, draw_map
from src.reporting.plots import write_png
from src.support.base import SupportSet
from src.system.atomic_write import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ANCHORS = 16  # in a picture
MAX_SAMPLE = 4096  # training images that are searched for members of prototypes: a tenth of all, from 1,000 to this
MEMBERS = 8  # of a prototype
PROTOTYPES = 24  # of each kind in a picture
TILE = 64  # pixels
TILE_GAP = 6  # pixels between two tiles
ANCHOR_GAP = 3 * TILE_GAP  # further pixels between an anchor and the members of its prototype
FRAME = (213, 94, 0)  # RGB colour of the frame around a queue's entry that is the anchor's own image


class Tile(NamedTuple):
    image: Tensor  # [3, S, S] uint8
    text: str = ""
    colour: str = "#404040"
    framed: bool = False


def illustrate(
    method: Method, frozen: FrozenEncoder, data: Dataset, directory: Path, epoch: int, last: bool
) -> list[Path]:
    """Draw ``positives.png``, of prototypes also ``prototypes.png``, and after the last epoch ``map.png``.

    The pictures of each epoch are kept in ``pictures/``. Nothing is drawn if nothing is stored, or not enough yet.
    Without labels, images have no names and prototypes no purity.

    Returns:
        The files to log.
    """
    support = method.support
    if support is None or not support.ready:
        return []
    size = min(MAX_SAMPLE, max(1000, len(data.train) // 10)) if support.shared else ANCHORS
    rows_N = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:size]
    rows_N = rows_N.to(data.train.labels.device)
    sample = data.train.take(rows_N)
    z_ND = embed(method, frozen, sample)
    drawn = {"positives": positives(support, sample, rows_N, z_ND, data)}
    if support.shared:
        drawn["prototypes"] = prototypes(support, sample, z_ND, data)
    paths = []
    for name, figure in drawn.items():
        if figure is not None:
            kept = directory / "pictures" / f"{name}-epoch-{epoch:04}.png"
            kept.parent.mkdir(exist_ok=True)
            write_png(figure, kept, dpi=100)
            write_whole(directory / f"{name}.png", kept.read_bytes())
            paths.append(kept)
    if last and data.val is not None and len(data.val) >= MIN_MAP_IMAGES:
        val = data.val.take(choose_images(data.val.labels, len(data.classes)))
        z_ND = embed(method, frozen, val)
        prototypes_KD = None
        if support.shared:
            found = support.lookup(z_ND)
            _, rows_K = np.unique(found.ids.numpy(force=True), return_index=True)
            prototypes_KD = found.embeddings[np.sort(rows_K)]  # each once, in the order of the images
        paths.append(directory / "map.png")
        labels_N = val.labels if data.classes else torch.full_like(val.labels, UNLABELLED)
        write_png(draw_map(F.normalize(z_ND, dim=1), labels_N, data.classes, prototypes_KD), paths[-1], dpi=120)
    return paths


def embed(method: Method, frozen: FrozenEncoder, split: Split) -> Tensor:
    """Compute the embeddings [N, D] of a split's images, without augmentation, by which the support set is queried."""
    encoder, projector = method.lookup_networks
    return project(projector, frozen.of(encoder).features(split).x_NF)


def positives(support: SupportSet, sample: Split, rows_N: Tensor, z_ND: Tensor, data: Dataset) -> Figure | None:
    """Draw a few anchors, each beside the images that its nearest entry stands for; None if these are not known.

    Args:
        support: filled.
        sample: images; the first are the anchors.
        rows_N: the rows of these images in the training split.
        z_ND: the embeddings of these images.
        data: has the class names, and the images that a queue's entries are of.
    """
    found = support.lookup(z_ND)
    blocks = []
    images_N = None if support.shared else support.images_of(found.ids)
    if images_N is None and not support.shared:
        return None
    cosine_N = (F.normalize(z_ND, dim=1) * found.embeddings).sum(1)
    for anchor in range(min(ANCHORS, len(sample))):
        label = int(sample.labels[anchor])
        tiles = [Tile(_one(sample, anchor).squares("cpu")[0], _name(data, label))]
        if images_N is not None:
            row = int(images_N[anchor])
            if row >= 0:  # else the entry is not of one image
                tiles.append(_member(data, _one(data.train, row), label, framed=row == int(rows_N[anchor])))
        else:
            others = (found.ids == found.ids[anchor]).nonzero().flatten()
            others = others[others != anchor]
            nearest = others[cosine_N[others].argsort(descending=True)][:MEMBERS]
            tiles += [_member(data, _one(sample, int(each)), label) for each in nearest]
        blocks.append(tiles)
    what = "the nearest members of its prototype" if support.shared else "the nearest entry (framed: its own image)"
    columns, apart = (2, ANCHOR_GAP) if support.shared else (4, 0)  # a pair is recognised without a further gap
    return sheet(blocks, [""] * columns, f"Anchors, and beside each {what}", apart)


def prototypes(support: SupportSet, sample: Split, z_ND: Tensor, data: Dataset) -> Figure | None:
    """Draw the largest, the purest and the most mixed prototypes, each with its nearest members.

    Without labels only the largest; None if no prototype has enough members.
    """
    found = support.lookup(z_ND)
    cosine_N = (F.normalize(z_ND, dim=1) * found.embeddings).sum(1)
    groups = {}
    for prototype in found.ids.unique().tolist():
        members = (found.ids == prototype).nonzero().flatten()
        if len(members) >= MEMBERS:
            counts = sample.labels.to(members.device)[members].bincount(minlength=len(data.classes))
            purity = float(counts.max()) / len(members)
            nearest = members[cosine_N[members].argsort(descending=True)][:MEMBERS]
            groups[prototype] = (len(members), purity, int(counts.argmax()), nearest.tolist())
    if not groups:
        return None
    half = min(PROTOTYPES, len(groups) // 2)  # so that none is among both the purest and the most mixed
    by_size = sorted(groups.values(), key=lambda each: -each[0])[:PROTOTYPES]
    by_purity = sorted(groups.values(), key=lambda each: -each[1])
    columns = {"largest": by_size}
    if data.labelled:
        columns |= {"purest": by_purity[:half], "most mixed": by_purity[::-1][:half]}
    blocks: list[list[Tile]] = []
    for line in range(max(map(len, columns.values()))):
        for column in columns.values():
            tiles: list[Tile] = []
            if line < len(column):
                size, purity, common, members = column[line]
                tiles = [Tile(_one(sample, each).squares("cpu")[0]) for each in members]
                of_a_class = f", {purity:.0%} of class {_name(data, common)}" if data.labelled else ""
                tiles[0] = tiles[0]._replace(text=f"{size} members{of_a_class}")
            blocks.append(tiles)
    return sheet(
        blocks, list(columns), f"Prototypes, with {MEMBERS} of their members among {len(sample):,} training images"
    )


def sheet(blocks: Sequence[Sequence[Tile]], heads: Sequence[str], title: str, apart: int = 0) -> Figure:
    """Draw blocks of tiles in a grid, a column for each head, with each tile's text below it.

    Args:
        blocks: line by line.
        heads: of the columns.
        title: above all.
        apart: further pixels between a block's first tile and the others.
    """
    from matplotlib.figure import Figure

    columns, width = len(heads), max(map(len, blocks))
    lines = -(-len(blocks) // columns)
    column_width = (width + 0.4) * (TILE + TILE_GAP) + apart
    top = 6 * TILE_GAP if any(heads) else 4 * TILE_GAP
    size = (math.ceil(TILE_GAP + columns * column_width - 0.4 * TILE), math.ceil(top + lines * (TILE + 3 * TILE_GAP)))
    canvas = torch.full((3, size[1], size[0]), 255, dtype=torch.uint8)
    figure = Figure(figsize=(max(3.0, size[0] / 100), size[1] / 100))  # a pixel of the canvas is one of the picture's
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.text(TILE_GAP, 2 * TILE_GAP, title, fontsize=8, va="center")
    for column, head in enumerate(heads):
        axes.text(TILE_GAP + column * column_width, 4.5 * TILE_GAP, head, fontsize=8, va="center", weight="bold")
    for number, tiles in enumerate(blocks):
        line, column = divmod(number, columns)
        for place, tile in enumerate(tiles):
            x = TILE_GAP + round(column * column_width) + place * (TILE + TILE_GAP) + (apart if place else 0)
            y = top + line * (TILE + 3 * TILE_GAP)
            canvas[:, y : y + TILE, x : x + TILE] = _enlarged(tile)
            axes.text(x, y + TILE + 1.4 * TILE_GAP, tile.text, fontsize=6, color=tile.colour, va="center")
    axes.imshow(canvas.permute(1, 2, 0).numpy(), interpolation="nearest", aspect="auto")
    axes.set(xlim=(0, max(300, size[0])), ylim=(size[1], 0))
    return figure


def _enlarged(tile: Tile) -> Tensor:
    """A tile's image as [3, TILE, TILE] uint8, with its frame."""
    image = F.interpolate(tile.image.cpu()[None].float(), size=(TILE, TILE), mode="nearest")[0].to(torch.uint8)
    if tile.framed:
        frame = torch.tensor(FRAME, dtype=torch.uint8)[:, None, None].expand(3, TILE, TILE).clone()
        frame[:, 3:-3, 3:-3] = image[:, 3:-3, 3:-3]
        return frame
    return image


def _member(data: Dataset, image: Split, wanted: int, framed: bool = False) -> Tile:
    label = int(image.labels[0])
    agrees = data.labelled and label == wanted
    return Tile(image.squares("cpu")[0], _name(data, label), "#009e73" if agrees else "#404040", framed)


def _one(split: Split, place: int) -> Split:
    """The image at a place of a split."""
    return split.take(torch.tensor([place], device=split.labels.device))


def _name(data: Dataset, label: int) -> str:
    return class_text(data.classes[label], 14) if data.labelled else ""
