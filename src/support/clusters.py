"""What prototypes have to do with classes: figures that explain an agreement.

Shapes: C classes, K prototypes. All arithmetic is float32 or better.
"""

from __future__ import annotations

from torch import Tensor


def purity(counts_KC: Tensor) -> float:
    """Share of the members whose class is the commonest of their prototype: 1 if no prototype mixes classes.

    Source: Manning, Raghavan and Schütze, "Introduction to Information Retrieval", 2008, section 16.3.
    """
    return float(counts_KC.amax(1).sum() / counts_KC.sum())


def normalised_mutual_information(counts_KC: Tensor) -> float:
    """What prototype and class tell of each other: 0 (nothing) to 1 (everything), over the mean of their entropies.

    Source: Manning, Raghavan and Schütze, 2008, section 16.3.
    """
    apart = entropy(counts_KC.sum(1)) + entropy(counts_KC.sum(0))
    together = entropy(counts_KC.flatten())
    return float(2 * (apart - together) / apart) if apart > 0 else 1.0


def entropy(weights: Tensor) -> Tensor:
    """In nats, of weights that need not sum to 1."""
    shares = weights[weights > 0].double() / weights.sum().double()
    return -(shares * shares.log()).sum()
