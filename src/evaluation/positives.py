"""The quality of positives, measured with images that no support set has ever stored.

A training image finds its own old embedding in a queue, and is a member of its own prototype. Neither is true of a
validation image. What a learner is given is a vector, whether it is an embedding, a prototype or another view, so the
vector itself is judged: the same measure serves all support sets of all sizes, and a loss with nothing stored.

Shapes: C classes, D dimensions, F features, N images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.methods.base import Method
from src.support.search import Search


@torch.no_grad()
def project(projector: nn.Module, features_NF: Tensor) -> Tensor:
    """Project features to embeddings [N, D] float32, with the projector in evaluation mode and not compiled."""
    training = projector.training
    projector.eval()
    with torch.compiler.set_stance("force_eager"):
        z_ND = projector(features_NF)
    projector.train(training)
    return z_ND.float()


def right_positives(method: Method, features_NF: Tensor, labels_N: Tensor, search: Search) -> dict[str, float]:
    """``val/right_positives``: the percentage of images whose positive is right.

    The positive is the nearest stored vector. A method without a support set takes another view, for which the image's
    own embedding stands here; no crop of an image is closer to it. See `right_percent`.

    Args:
        method: any method; the result is empty as long as its support set is not filled.
        features_NF: features from the method's encoder for lookups (`src.methods.base.Method.lookup_networks`).
        labels_N: the images' classes.
        search: exact nearest neighbours.
    """
    support, (_, projector) = method.support, method.lookup_networks
    if support is not None and not support.ready:
        return {}
    z_ND = F.normalize(project(projector, features_NF), dim=1)
    positives_ND = z_ND if support is None else support.lookup(z_ND).embeddings
    percent = right_percent(positives_ND, z_ND, labels_N, search)
    return {} if percent is None else {"val/right_positives": percent}


def right_percent(positives_ND: Tensor, embeddings_ND: Tensor, labels_N: Tensor, search: Search) -> float | None:
    """How many positives are nearer to the mean of their image's class than to that of any other class, in percent.

    The means are of the images' own embeddings, by cosine similarity. An image does not count in the mean by which its
    own positive is judged, since the positive is close to it whatever its class. So an image that is alone in its class
    is not judged.

    Args:
        positives_ND: unit vectors.
        embeddings_ND: the images' own, unit vectors.
        labels_N: the images' classes.
        search: exact nearest neighbours.

    Returns:
        The percentage; None if no image can be judged, or if all are of one class.
    """
    classes, class_N, count_C = labels_N.unique(return_inverse=True, return_counts=True)
    judged_N = count_C[class_N] > 1
    if len(classes) < 2 or not judged_N.any():
        return None
    sum_CD = embeddings_ND.new_zeros(len(classes), embeddings_ND.shape[1]).index_add_(0, class_N, embeddings_ND)
    own_N = (positives_ND * F.normalize(sum_CD[class_N] - embeddings_ND, dim=1)).sum(1)
    score_N2, id_N2 = search(positives_ND, F.normalize(sum_CD, dim=1), k=2)
    other_N = torch.where(id_N2[:, 0] == class_N, score_N2[:, 1], score_N2[:, 0])
    return 100 * float((own_N > other_N)[judged_N].float().mean())
