"""The quality of a support set's positives, measured with images that it has never stored.

A training image finds its own old embedding in a queue, and is a member of its own prototype. Neither is true of a
validation image. Sizes of one kind of support set can be compared by this; a queue and prototypes cannot, because the
nearest embedding is right more often than as many as a prototype has members.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from src.methods.base import Method


@torch.no_grad()
def project(projector: nn.Module, features_NF: Tensor) -> Tensor:
    """Project features to embeddings [N, D] float32, with the projector in evaluation mode and not compiled."""
    training = projector.training
    projector.eval()
    with torch.compiler.set_stance("force_eager"):
        z_ND = projector(features_NF)
    projector.train(training)
    return z_ND.float()


def agreement(method: Method, features_NF: Tensor, labels_N: Tensor) -> dict[str, float]:
    """``support/val_agreement``: how much of each image's nearest entry in the support set is of the image's class.

    Args:
        method: a method with a support set that is ready.
        features_NF: features from the method's encoder for lookups (`src.methods.base.Method.lookup_networks`).
        labels_N: the images' classes.

    Returns:
        The mean share; empty if the classes of the stored entries are not known.
    """
    support, (_, projector) = method.support, method.lookup_networks
    assert support is not None
    share_N = support.agreement_of(support.lookup(project(projector, features_NF)).ids, labels_N)
    return {} if share_N is None else {"support/val_agreement": float(share_N.mean())}
