import math

import pytest
import torch
import torch.nn.functional as F

from src.evaluation.diagnostics import alignment, effective_rank, uniformity


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
