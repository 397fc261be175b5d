import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import normalized_mutual_info_score

from src.support.clusters import normalised_mutual_information, purity

COUNTS = arrays(np.int64, st.tuples(st.integers(1, 6), st.integers(1, 6)), elements=st.integers(0, 9))


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
