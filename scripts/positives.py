"""Measure how good the positives in a finished run's own embeddings are, by the number of stored vectors.

    python -m scripts.positives RUN [RUN ...] [--data DIR] [--out FILE]

RUN is the folder of a finished run. Its training images are embedded twice, as views 1 and 2, with batch norm using
batch statistics as in training. Each view 1 is an anchor. The second views of the other images are stored, either as
they are, with the nearest one as the positive (NNCLR), or as prototypes, with a random member of the nearest prototype
as the positive (KMCLR pulls towards all members at once). A positive is good if it has the anchor's class. The most
confident anchors are those nearest to their positives.

A prototype has many members, and the nearest embedding is good more often than the nearest fifty. So a prototype is
compared with as many embeddings as it has members on average, and the last column judges what is returned, one vector
in either case, by the class whose mean is nearest to it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.workbench import config_of, machine, publish
from src import build
from src.config import identity
from src.data import Dataset, load
from src.evaluation.positives import right_percent
from src.models import autocast
from src.reporting.table import markdown
from src.runs import checkpoint
from src.support.search import TorchSearch, cluster
from src.training.state import TrainState

SIZES = (400, 4096, 16384)
KS = (50, 200, 400, 800)
FRACTIONS = (1.0, 0.1, 0.01)  # fractions of the anchors, from the most confident on
HEADER = ["% of the anchor's class", "all anchors", "most confident tenth", "most confident hundredth", "its vector"]
OUT = Path("results/ablations/positives.md")


class Views(NamedTuple):
    """Embeddings of two views of N training images, in random order, and the images' labels."""

    first_ND: Tensor
    second_ND: Tensor
    labels_N: Tensor


def embed(state: TrainState, data: Dataset) -> dict[str, Views]:
    """Embed two views of each image; return unit vectors from the projector ("embeddings") and encoder ("features")."""
    makers = build.views(state.cfg, data)
    torch.manual_seed(0)
    order = torch.randperm(len(data.train))
    batch_size = state.cfg.batch_size
    order = order[: len(order) // batch_size * batch_size]
    found: dict[str, tuple[list[Tensor], list[Tensor]]] = {"embeddings": ([], []), "features": ([], [])}
    for rows in order.split(batch_size):
        images = data.train.take(rows).images
        for place, view in enumerate(makers):
            with torch.no_grad(), autocast(torch.device("cpu"), state.dtype):
                features = state.method.encoder(view(images))
                embeddings = state.method.projector(features)
            found["embeddings"][place].append(F.normalize(embeddings.float(), dim=1))
            found["features"][place].append(F.normalize(features.float(), dim=1))
    labels = data.train.labels[order]
    return {space: Views(torch.cat(first), torch.cat(second), labels) for space, (first, second) in found.items()}


class Positives(NamedTuple):
    """What a support set returns for N anchors."""

    scores_N: Tensor  # cosine similarities; for several embeddings that of the nearest
    good_N: Tensor  # float32 shares of the anchor's class among the positives, without the anchor's own image
    vectors_ND: Tensor  # the embedding, the mean of several, or the prototype


def of_the_other_view(views: Views) -> Positives:
    """The other view of each image, which is the positive where nothing is stored."""
    scores_N = (views.first_ND * views.second_ND).sum(1)
    return Positives(scores_N, torch.ones(len(scores_N)), views.second_ND)


def of_neighbours(views: Views, size: int, count: int = 1) -> Positives:
    """Find the ``count`` nearest of ``size`` stored images other than the anchor's own."""
    scores_NK, ids_NK = TorchSearch()(views.first_ND, views.second_ND[:size], k=count + 1)
    itself_NK = ids_NK == torch.arange(len(ids_NK))[:, None]
    kept_NK = itself_NK.int().sort(dim=1, stable=True).indices[:, :count]  # the anchor's own view comes last
    ids_NK, scores_NK = ids_NK.gather(1, kept_NK), scores_NK.gather(1, kept_NK)
    good_NK = views.labels_N[ids_NK] == views.labels_N[:, None]
    return Positives(scores_NK[:, 0], good_NK.float().mean(1), views.second_ND[ids_NK].mean(1))


def of_prototypes(views: Views, k: int) -> Positives:
    """Find the nearest of k prototypes of all stored images, whose members are the positives."""
    means_KD, members_N = cluster(
        views.second_ND, k, spherical=True, seed=0, initial_KD=views.second_ND[:k], iterations=20
    )
    scores_N1, ids_N1 = TorchSearch()(views.first_ND, F.normalize(means_KD, dim=1))
    ids_N, labels_N = ids_N1[:, 0], views.labels_N
    classes_KC = torch.zeros(k, int(labels_N.max()) + 1)
    classes_KC.index_put_((members_N, labels_N), torch.ones(()), accumulate=True)
    itself_N = (members_N == ids_N).float()
    alike_N = classes_KC[ids_N, labels_N] - itself_N
    share_N = alike_N / (classes_KC[ids_N].sum(1) - itself_N).clamp(min=1)
    return Positives(scores_N1[:, 0], share_N, means_KD[ids_N])


def percentages(views: Views, found: Positives) -> list[str]:
    """The cells of a row: good positives among `FRACTIONS` of the anchors, and how often the vector is right.

    All are percentages. The second views have the role of the validation images in `src.evaluation.positives`.
    """
    good_N = found.good_N[found.scores_N.argsort(descending=True)]
    shares = [good_N[: round(fraction * len(good_N))].mean() for fraction in FRACTIONS]
    vectors_ND = F.normalize(found.vectors_ND, dim=1)
    right = right_percent(vectors_ND, views.second_ND, views.labels_N, TorchSearch())
    return [*(f"{100 * float(share):.1f}" for share in shares), "-" if right is None else f"{right:.1f}"]


def tables(run: Path, data: Path | None) -> list[str]:
    """Make a Markdown table for the embeddings of a run, and one for its features."""
    cfg = config_of(run, data)
    images = load(cfg.data)
    state = TrainState(cfg, images)
    saved = checkpoint.load_latest(run / "checkpoints")
    if saved is None:
        raise SystemExit(f"{run}: there is no checkpoint")
    checkpoint.restore(state.method, saved[1]["model"], saved[0])
    lines = []
    for space, views in embed(state, images).items():
        stored = len(views.labels_N)
        sizes = [size for size in SIZES if size < stored]
        rows = [("the other view", of_the_other_view(views))]
        rows += [(f"nearest of {size:,}", of_neighbours(views, size)) for size in (*sizes, stored)]
        several = [(stored // k, of_neighbours(views, stored, stored // k)) for k in reversed(KS)]
        rows += [(f"one of the nearest {count} of {stored:,}", found) for count, found in several]
        rows += [(f"member of the nearest of {k:,} prototypes", of_prototypes(views, k)) for k in KS]
        lines += [
            f"**{identity.run_name(cfg)}**, {cfg.epochs} epochs, {space}:",
            "",
            *markdown(HEADER, [[name, *percentages(views, found)] for name, found in rows]),
            "",
        ]
    return lines


def main() -> None:
    """Measure all runs, and write and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    lines = [line for run in args.runs for line in tables(run, args.data)]
    foot = f"`python -m scripts.positives RUN ...`; {machine()}."
    publish(args.out, ["# How good could positives be?", "", *lines, foot])


if __name__ == "__main__":
    main()
