import pytest
import torch
import torch.nn.functional as F

from scripts.positives import Views, of_neighbours, of_prototypes, of_the_other_view, percentages
from src.evaluation.positives import right_percent
from src.support.search import TorchSearch


@pytest.fixture
def views():
    """Twelve images of three classes, whose two views are alike, in four groups of three neighbours."""
    torch.manual_seed(0)
    groups_GD = F.normalize(torch.eye(4) + 0.01, dim=1)
    second_ND = F.normalize(groups_GD.repeat_interleave(3, 0) + 0.05 * torch.rand(12, 4), dim=1)
    labels_N = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 1, 1, 0])
    mixed_N = torch.arange(12).view(4, 3).T.flatten()  # the first four are of different groups
    return Views(second_ND[mixed_N], second_ND[mixed_N], labels_N[mixed_N])


def test_neighbours_are_those_of_a_sorted_list_without_the_anchor(views):
    found = of_neighbours(views, 12, 2)
    similar_NN = views.first_ND @ views.second_ND.T
    for anchor in range(12):
        others = [other for other in similar_NN[anchor].argsort(descending=True).tolist() if other != anchor][:2]
        right = sum(views.labels_N[other] == views.labels_N[anchor] for other in others) / 2
        assert found.good_N[anchor] == right
        torch.testing.assert_close(found.vectors_ND[anchor], views.second_ND[others].mean(0))
        assert found.scores_N[anchor] == pytest.approx(float(similar_NN[anchor, others[0]]))


def test_members_of_prototypes_do_not_include_the_anchor(views):
    found = of_prototypes(views, 4)
    good = {0: [2, 2, 2], 1: [1, 1, 0], 2: [2, 2, 2], 3: [1, 1, 0]}  # of the two others of each image of a group
    expected = sorted(each / 2 for group in good.values() for each in group)
    assert sorted(found.good_N.tolist()) == pytest.approx(expected)


def test_the_other_view_is_of_the_class_and_its_vector_is_judged_without_itself(views):
    found = of_the_other_view(views)
    *shares, right = percentages(views, found)
    assert shares[:2] == ["100.0"] * 2  # a hundredth of twelve images is none
    assert right == f"{right_percent(views.second_ND, views.second_ND, views.labels_N, TorchSearch()):.1f}"
    assert percentages(views, found._replace(vectors_ND=9 * found.vectors_ND))[-1] == right
