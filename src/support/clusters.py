"""Metrics of how well prototypes, taken as clusters, match the classes.

If several processes hold the prototypes, each passes the counts of its own, and ``add`` sums over the processes.

Shapes: C classes, K prototypes. All arithmetic is float32 or better.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Add = Callable[[Tensor], Tensor]


def alone(value: Tensor) -> Tensor:
    """Sum over a single process, which is the value itself."""
    return value


def purity(counts_KC: Tensor, add: Add = alone) -> float:
    """Share of members that have the most common class of their prototype: 1 if no prototype mixes classes.

    Source: Manning, Raghavan and Schütze, "Introduction to Information Retrieval", 2008, section 16.3.
    """
    return float(add(counts_KC.amax(1).sum()) / add(counts_KC.sum()))


def normalised_mutual_information(counts_KC: Tensor, add: Add = alone) -> float:
    """Mutual information of prototype and class, divided by the mean of their entropies: 0 (independent) to 1.

    Source: Manning, Raghavan and Schütze, 2008, section 16.3.
    """
    apart = entropy(counts_KC.sum(1), add) + entropy(add(counts_KC.sum(0)))
    together = entropy(counts_KC.flatten(), add)
    return float(2 * (apart - together) / apart) if apart > 0 else 1.0


def entropy(weights: Tensor, add: Add = alone) -> Tensor:
    """Entropy, in nats, of weights that need not sum to 1."""
    shares = weights[weights > 0].double() / add(weights.sum()).double()
    return -add((shares * shares.log()).sum())
