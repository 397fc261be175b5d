from functools import partial
from itertools import product

import pytest
import torch
from torch import nn

from src import models
from src.config import schema
from src.losses import barlow_twins, info_nce, nt_xent
from src.methods.base import Parts
from src.methods.contrast import Contrast
from src.support.base import Space
from src.support.evolving import Evolving
from src.support.kmeans import KMeans
from src.support.queue import Queue
from src.support.search import TorchSearch
from tests.methods.test_teacher import train

BATCH, DIM = 8, 6


def contrast(support, support_weight=1.0, predictor=True, mask_shared=True, temperature=0.2):
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 10), nn.ReLU())
    same_prototype = "mask" if mask_shared else "negative"
    objective = schema.Contrast("mixed", temperature, support_weight, 12 if predictor else 0, same_prototype)
    return Contrast(Parts(encoder, models.projector(10, [12], DIM), 10, DIM, support), objective)


def views():
    return torch.randn(2, BATCH, 3, 4, 4)


def simclr(temperature=0.2):
    return contrast(None, support_weight=0.0, predictor=False, temperature=temperature)


def nnclr(size=32, **settings):
    return contrast(Queue(size, DIM, TorchSearch()) if size else None, **settings)


def kmclr(k=3, **settings):
    return contrast(KMeans(k, DIM, 4, TorchSearch()), **settings)


def fill(method, rows=64):
    method.support.update(torch.randn(rows, DIM), torch.arange(rows), torch.arange(rows) % 4)


def test_simclr_is_nt_xent_of_the_projections():
    method = simclr(temperature=0.3)
    view1, view2 = views()
    outcome = method(view1, view2)
    z1, z2 = (method.projector(method.encoder(view)) for view in (view1, view2))
    assert torch.equal(outcome.loss, nt_xent(z1, z2, 0.3))
    assert outcome.ids is None


@pytest.mark.parametrize("make", [simclr, nnclr, kmclr])
def test_decorrelation_stands_beside_the_loss(make):
    method = make()
    view1, view2 = views()
    z1, z2 = (method.projector(method.encoder(view)) for view in (view1, view2))
    without = method(view1, view2).loss
    method.objective.decorrelation, method.objective.off_diagonal = 0.02, 0.3
    torch.testing.assert_close(method(view1, view2).loss, without + 0.02 * barlow_twins(z1, z2, 0.3))


def expected(method, view1, view2, positives=None, groups=None):
    """The support set's term of the loss, without that of the two views."""
    z1, z2 = (method.projector(method.encoder(view)) for view in (view1, view2))
    q1, q2 = positives or (z1.detach(), z2.detach())
    if method.predictor is None:
        return nt_xent(z1, z2, 0.2, (q1, q2), groups)
    p1, p2 = method.predictor(z1), method.predictor(z2)
    groups1, groups2 = (None, None) if groups is None else groups.chunk(2)
    return (info_nce(q1, p2, 0.2, groups1) + info_nce(q2, p1, 0.2, groups2)) / 2


@pytest.mark.parametrize("predictor", [True, False])
@pytest.mark.parametrize("make", [nnclr, kmclr, partial(nnclr, size=0)], ids=["nnclr", "kmclr", "nothing"])
def test_the_other_view_is_the_positive_until_the_support_set_is_filled(make, predictor):
    method = make(predictor=predictor)
    view1, view2 = views()
    outcome = method(view1, view2)
    without = expected(method, view1, view2)
    assert torch.equal(outcome.loss, without)
    assert outcome.ids is None
    weights = tuple(method.parameters())  # the positive has no gradient
    for found, wanted in zip(
        torch.autograd.grad(outcome.loss, weights), torch.autograd.grad(without, weights), strict=True
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("predictor", [True, False])
@pytest.mark.parametrize("make", [nnclr, partial(kmclr, mask_shared=False), kmclr], ids=["nnclr", "kmclr", "masked"])
def test_the_loss_is_symmetric_and_uses_each_views_nearest(make, predictor):
    method = make(predictor=predictor)
    fill(method)
    view1, view2 = views()
    outcome = method(view1, view2)
    found = [method.support.lookup(method.projector(method.encoder(view)).detach()) for view in (view1, view2)]
    positives, ids = (found[0][0], found[1][0]), torch.cat([found[0][1], found[1][1]])
    groups = ids if method.support.shared and method.objective.same_prototype == "mask" else None
    torch.testing.assert_close(outcome.loss, expected(method, view1, view2, positives, groups))
    assert torch.equal(outcome.ids, ids)
    torch.testing.assert_close(method(view2, view1).loss, outcome.loss)


@pytest.mark.parametrize("make", [nnclr, kmclr])
def test_the_views_have_the_rest_of_the_loss(make):
    """The support set's term has the weight ``support_weight``, and NT-Xent of the two views what is left of 1."""
    method = make(support_weight=1.0)
    fill(method)
    view1, view2 = views()
    support = method(view1, view2).loss
    z1, z2 = (method.projector(method.encoder(view)) for view in (view1, view2))
    method.objective.support_weight = 0.3
    torch.testing.assert_close(method(view1, view2).loss, 0.3 * support + 0.7 * nt_xent(z1, z2, 0.2))


@pytest.mark.parametrize(
    "make", [nnclr, kmclr, partial(kmclr, support_weight=0.3), partial(kmclr, support_weight=0.3, predictor=False)]
)
def test_forward_leaves_the_support_set_alone_and_sends_it_no_gradient(make):
    method = make()
    fill(method)
    before = {k: v.clone() for k, v in method.support.state_dict().items() if torch.is_tensor(v)}
    view1, view2 = views()
    outcome = method(view1, view2)
    outcome.loss.backward()
    after = method.support.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert not outcome.embeddings.requires_grad
    assert not outcome.features.requires_grad
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
    assert torch.equal(outcome.features, torch.cat([method.encoder(view) for view in (view1, view2)]))
    assert torch.equal(outcome.embeddings, method.projector(method.encoder(view1)))


@pytest.mark.parametrize("make", [simclr, nnclr, kmclr, partial(kmclr, predictor=False)])
def test_a_few_steps_lower_the_loss(make):
    method = make()
    if method.support is not None:
        fill(method)
    view1 = torch.randn(BATCH, 3, 4, 4)
    view2 = view1 + 0.1 * torch.randn_like(view1)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    losses = []
    for _ in range(30):
        loss = method(view1, view2).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


def test_masking_keeps_equal_positives_from_being_negatives():
    """With one prototype all rows have the same positive: masked, no negative is left and the loss is 0."""
    view1, view2 = views()
    for mask_shared, predictor in product((True, False), repeat=2):
        method = kmclr(k=1, mask_shared=mask_shared, predictor=predictor)
        fill(method)
        loss = method(view1, view2).loss.item()
        assert loss == 0 if mask_shared else loss > 0.1


def test_with_evolving_prototypes_the_embeddings_do_not_collapse():
    support = Evolving(Space(16, 10, TorchSearch()), size=40, start=20, penalty=0.001, every=5)
    projector = models.projector(128, [32], 16)
    objective = schema.Contrast("mixed", 0.1, 0.5)
    cosine, rank = train(Contrast(Parts(models.ResNetTiny("small"), projector, 128, 16, support), objective))
    assert cosine < 0.7
    assert rank > 4
