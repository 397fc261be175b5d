import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import normalized_mutual_info_score

from src.evaluation.diagnostics import alignment, effective_rank, normalised_mutual_information, purity, uniformity

COUNTS = arrays(np.int64, st.tuples(st.integers(1, 6), st.integers(1, 6)), elements=st.integers(0, 9))


def test_alignment_of_known_pairs():
    x = torch.tensor([[3.0, 0.0], [0.0, 5.0]])
    assert alignment(x, 7 * x) == pytest.approx(0)
    assert alignment(x, -x) == pytest.approx(4)
    assert alignment(x, x.flip(0)) == pytest.approx(2)


def test_uniformity_is_the_mean_over_pairs():
    x = torch.randn(7, 3)
    unit = F.normalize(x, dim=1)
    pairs = [math.exp(-2 * float((unit[i] - unit[j]).square().sum())) for i in range(7) for j in range(i)]
    assert uniformity(x) == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-4)
    assert uniformity(torch.ones(4, 3)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_effective_rank_counts_equal_directions(rank):
    directions = torch.linalg.qr(torch.randn(8, rank))[0]
    around = torch.cat([torch.eye(rank), -torch.eye(rank)])  # their mean is 0
    assert effective_rank(around @ directions.T + 3) == pytest.approx(rank, rel=1e-4)


def members(counts):
    prototypes, classes = np.indices(counts.shape)
    return np.repeat(prototypes.ravel(), counts.ravel()), np.repeat(classes.ravel(), counts.ravel())


@settings(max_examples=60)
@given(COUNTS.filter(lambda counts: counts.sum() > 0))
def test_mutual_information_is_that_of_scikit_learn(counts):
    expected = normalized_mutual_info_score(*members(counts))
    assert normalised_mutual_information(torch.tensor(counts)) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=60)
@given(COUNTS.filter(lambda counts: counts.sum() > 0))
def test_purity_by_counting(counts):
    prototypes, classes = members(counts)
    commonest = sum(np.bincount(classes[prototypes == k]).max() for k in set(prototypes))
    assert purity(torch.tensor(counts)) == pytest.approx(commonest / counts.sum())
