"""How good the positives are that a support set gives, by images that it has never held.

While it trains, an image finds its own old embedding in a queue, and has a share in its prototype. A validation image
has neither, so by these a queue and prototypes can be compared.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from src.methods.base import Method


@torch.no_grad()
def project(projector: nn.Module, features_NF: Tensor) -> Tensor:
    """The embeddings [N, D] float32 of features; the projector is in evaluation mode meanwhile, and not compiled."""
    training = projector.training
    projector.eval()
    with torch.compiler.set_stance("force_eager"):
        z_ND = projector(features_NF)
    projector.train(training)
    return z_ND.float()


def agreement(method: Method, features_NF: Tensor, labels_N: Tensor) -> dict[str, float]:
    """``support/val_agreement``: of what the images find nearest in the support set, how much is of their class.

    Args:
        method: with a support set that is ready.
        features_NF: of its encoder for lookups (`src.methods.base.Method.lookup_networks`).
        labels_N: the images' classes.

    Returns:
        The mean share; nothing where the classes of what is stored are not known.
    """
    support, (_, projector) = method.support, method.lookup_networks
    assert support is not None
    share_N = support.agreement_of(support.lookup(project(projector, features_NF)).ids, labels_N)
    return {} if share_N is None else {"support/val_agreement": float(share_N.mean())}
