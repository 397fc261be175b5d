import math

import pytest
import torch
import torch.nn.functional as F

from src.evaluation.diagnostics import alignment, collapsed_rank, effective_rank, uniformity


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


def test_effective_rank_is_of_the_singular_values():
    x = torch.randn(40, 6) * torch.arange(1, 7) + 3
    shares = torch.linalg.svdvals(x - x.mean(0))
    shares /= shares.sum()
    assert effective_rank(x) == pytest.approx(math.exp(-(shares * shares.log()).sum()), rel=1e-4)


@pytest.mark.parametrize("shape", [(64, 16), (16, 64)])
def test_collapse_is_a_line_or_a_point(shape):
    images, width = shape
    offset, direction = torch.randn(width), torch.randn(width)
    assert collapsed_rank(torch.randn(shape)) is None
    assert collapsed_rank(offset.expand(shape)) == 0
    assert collapsed_rank(offset + 1e-4 * torch.randn(shape)) == 0, "constant but for rounding"
    line = 5 * torch.randn(images, 1) * direction
    assert collapsed_rank(line) == pytest.approx(1, rel=0.01)
    assert collapsed_rank(line + offset) == pytest.approx(effective_rank(line + offset), rel=0.01)
    around = torch.cat([torch.eye(2), -torch.eye(2)]).repeat(4, width // 2)
    assert collapsed_rank(around) is None, "two directions"
    assert collapsed_rank(F.normalize(offset, dim=0) + 0.05 * torch.randn(shape) / width**0.5) is None, "not constant"
    ellipse = around.clone()
    ellipse[:, 1::2] /= 10  # the shares of its singular values are 10/11 and 1/11
    assert collapsed_rank(ellipse) == pytest.approx(11 / 10 ** (10 / 11), rel=0.01)


def test_few_images_or_dimensions_are_no_collapse():
    assert collapsed_rank(torch.randn(2, 64)) is None
    assert collapsed_rank(torch.randn(64, 1)) is None
    line = torch.randn(9, 1) * torch.randn(8)
    assert collapsed_rank(line) == pytest.approx(1, rel=0.01)
    assert collapsed_rank(line[:8]) is collapsed_rank(line[:, :7]) is None
