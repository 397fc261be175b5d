"""The objectives with a teacher equal a few lines of plain torch, and do not collapse in the first steps on digits."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import normalize

from src import models
from src.config import schema
from src.evaluation.diagnostics import effective_rank
from src.losses import barlow_twins, ressl
from src.methods import teacher as teacher_module
from src.methods.base import Output, Parts
from src.methods.teacher import MNN, ReSSL
from src.support.base import Neighbors, Space
from src.support.evolving import Evolving
from src.support.kmeans import KMeans
from src.support.queue import Queue
from src.support.search import TorchSearch

BATCH, DIM = 8, 6


def teacher(support=None, **settings):
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 10), nn.ReLU())
    objective = schema.MNN(**({"name": "teacher", "momentum": 0.9, "predictor_hidden": 12, "neighbours": 1} | settings))
    made = MNN(Parts(encoder, models.projector(10, [12], DIM), 10, DIM, support), objective)
    with torch.no_grad():  # the student differs from its teacher, as after some steps
        for parameter in (*made.encoder.parameters(), *made.projector.parameters()):
            parameter += 0.1 * torch.randn_like(parameter)
    if support is not None:
        support.update(torch.randn(64, DIM), torch.arange(64), torch.arange(64) % 4)
    return made


def queue():
    return Queue(32, DIM, TorchSearch())


def prototypes():
    return KMeans(5, DIM, 4, TorchSearch())


def views():
    return torch.randn(2, BATCH, 3, 4, 4)


def expected(method, view1, view2, shares):
    """The loss, image by image and neighbour by neighbour."""

    def student(view):
        return normalize(method.predictor(method.projector(method.encoder(view))), dim=1)

    def slow(view):
        return normalize(method.teacher_projector(method.teacher_encoder(view)), dim=1)

    directions = []
    for view, other, share in ((view2, view1, shares[0]), (view1, view2, shares[1])):
        losses = []
        for p, t in zip(student(view), slow(other), strict=True):
            stored = [t]
            if method.support is not None:
                vectors = method.support.ring.rows_ND if isinstance(method.support, Queue) else method.support.means_KD
                vectors = normalize(vectors, dim=1)
                stored = vectors[(vectors @ t).argsort(descending=True)[: method.objective.neighbours]]
            mixtures = [share * n + (1 - share) * t for n in stored]
            losses.append(2 - 2 * p @ t + sum(2 - 2 * p @ mixture for mixture in mixtures) / len(mixtures))
        directions.append(sum(losses) / BATCH)
    return sum(directions) / 2


@pytest.mark.parametrize("neighbours", [1, 3])
@pytest.mark.parametrize("support", [lambda: None, queue, prototypes], ids=["nothing", "queue", "prototypes"])
def test_the_loss_is_the_mean_of_both_directions_to_the_target_and_to_the_mixtures(support, neighbours):
    method = teacher(support(), neighbours=neighbours)
    view1, view2 = views()
    torch.manual_seed(5)
    loss = method(view1, view2).loss
    torch.manual_seed(5)
    torch.testing.assert_close(loss, expected(method, view1, view2, torch.rand(2)))


@pytest.mark.parametrize("support", [queue, prototypes])
def test_a_relation_is_to_all_stored_vectors(support):
    settings = {"name": "relation", "momentum": 0.9, "predictor_hidden": 12}
    objective = schema.ReSSL(**settings, teacher_temperature=0.04, student_temperature=0.1)
    method = ReSSL(
        Parts(nn.Sequential(nn.Flatten(), nn.Linear(48, 10)), nn.Linear(10, DIM), 10, DIM, support()), objective
    )
    method.support.update(torch.randn(64, DIM), torch.arange(64), torch.arange(64) % 4)
    view1, view2 = views()
    outcome = method(view1, view2)
    p = [method.predictor(method.projector(method.encoder(view))) for view in (view1, view2)]
    t = [method.teacher_projector(method.teacher_encoder(view)) for view in (view1, view2)]
    assert torch.equal(outcome.ids, (normalize(torch.cat(t), dim=1) @ method.support.vectors_ND.T).argmax(1))
    losses = [
        (2 - 2 * torch.cosine_similarity(p[i], t[j])).mean() + ressl(p[i], t[j], method.support.vectors_ND, 0.1, 0.04)
        for i, j in ((0, 1), (1, 0))
    ]
    torch.testing.assert_close(outcome.loss, sum(losses) / 2)


def test_where_batch_norm_is_over_parts_the_teachers_are_of_other_images():
    """The teacher's images are shuffled, so that its parts hold other images than the student's."""
    encoder = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 10))
    models.split_batch_norms(encoder, 2)
    objective = schema.MNN(name="teacher", momentum=0.9, predictor_hidden=12, neighbours=1)
    method = MNN(Parts(encoder, models.projector(10, [12], DIM), 10, DIM, None), objective)
    view1, view2 = views()
    torch.manual_seed(5)
    loss = method(view1, view2).loss

    def halves(network, view):
        parts = [nn.functional.batch_norm(half, None, None, training=True) for half in view.chunk(2)]
        return network[1:](torch.cat(parts))

    torch.manual_seed(5)
    cosines = []
    for view, other in ((view2, view1), (view1, view2)):
        order = torch.randperm(BATCH)
        p = method.predictor(method.projector(halves(method.encoder, view)))
        t = method.teacher_projector(halves(method.teacher_encoder, other[order]))
        cosines.append(torch.cosine_similarity(p[order], t).mean())
    torch.testing.assert_close(loss, 4 - 2 * sum(cosines))


@pytest.mark.parametrize(("kind", "settings"), [(MNN, {"neighbours": 1}), (ReSSL, {})])
def test_the_pull_to_the_target_is_the_same_before_and_after_the_support_set_is_full(kind, settings, monkeypatch):
    """The support set is made to change nothing: MNN's neighbour is the target itself, and ReSSL's relation is 0."""
    monkeypatch.setattr(teacher_module, "ressl", lambda *_: 0)
    ids = torch.zeros(2 * BATCH, 1, dtype=torch.int64)
    support = SimpleNamespace(
        stopwatch=contextlib.nullcontext(),
        nearest=lambda targets, _: Neighbors(normalize(targets, dim=1)[:, None], ids),
        lookup=lambda targets: Neighbors(targets, ids[:, 0]),
        vectors_ND=None,
    )
    method = SimpleNamespace(objective=SimpleNamespace(student_temperature=0.1, teacher_temperature=0.04, **settings))
    predictions, targets = torch.randn(2, 2 * BATCH, DIM)
    full, _ = kind.loss_with_support(method, support, predictions, targets)
    torch.testing.assert_close(kind.loss_without_support(method, predictions, targets), full)


def test_with_nothing_stored_it_is_byol_whatever_the_shares():
    """The shares that mix a target with its neighbour, drawn at every step, then have no effect on the loss."""
    method = teacher()
    view1, view2 = views()
    losses = {method(view1, view2).loss.item() for _ in range(3)}
    assert len(losses) == 1
    cosines = [
        torch.cosine_similarity(
            method.predictor(method.projector(method.encoder(view))),
            method.teacher_projector(method.teacher_encoder(other)),
        ).mean()
        for view, other in ((view1, view2), (view2, view1))
    ]
    torch.testing.assert_close(torch.tensor(losses.pop()), 4 - 2 * sum(cosines).detach())


def test_the_shares_are_drawn_anew_at_every_step():
    """The loss mixes targets and their neighbours by random shares."""
    method = teacher(queue())
    view1, view2 = views()
    assert len({method(view1, view2).loss.item() for _ in range(5)}) == 5


@pytest.mark.parametrize("support", [queue, prototypes])
def test_the_teacher_asks_and_feeds_the_support_set(support):
    method = teacher(support(), neighbours=3)
    before = {key: value.clone() for key, value in method.support.state_dict().items() if torch.is_tensor(value)}
    view1, view2 = views()
    outcome = method(view1, view2)
    outcome.loss.backward()
    embeddings = [method.teacher_projector(method.teacher_encoder(view)) for view in (view1, view2)]
    assert torch.equal(outcome.embeddings, embeddings[1])
    assert torch.equal(outcome.ids, method.support.lookup(torch.cat(embeddings)).ids)
    after = method.support.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    for name, parameter in method.named_parameters():
        assert (parameter.grad is None) == name.startswith("teacher_")
    assert not outcome.embeddings.requires_grad
    assert not outcome.features.requires_grad
    assert torch.equal(outcome.features, torch.cat([method.encoder(view) for view in (view1, view2)]))


def test_decorrelation_is_of_the_students_projections():
    method = teacher()
    view1, view2 = views()
    z1, z2 = (method.projector(method.encoder(view)) for view in (view1, view2))
    without = method(view1, view2).loss
    method.objective.decorrelation, method.objective.off_diagonal = 0.02, 0.3
    torch.testing.assert_close(method(view1, view2).loss, without + 0.02 * barlow_twins(z1, z2, 0.3))


def test_until_it_is_filled_the_support_set_has_no_say():
    method = teacher()
    waiting = copy.deepcopy(method)
    waiting.support = Queue(32, DIM, TorchSearch())
    view1, view2 = views()
    outcome = waiting(view1, view2)
    assert outcome.ids is None
    assert torch.equal(outcome.loss, method(view1, view2).loss)


def test_the_teacher_is_the_running_mean_of_the_student():
    method = teacher(momentum=0.75)
    slow = [*method.teacher_encoder.parameters(), *method.teacher_projector.parameters()]
    before = [parameter.clone() for parameter in slow]
    method.after_step(0.5)
    student = [*method.encoder.parameters(), *method.projector.parameters()]
    for now, old, fast in zip(slow, before, student, strict=True):
        torch.testing.assert_close(now, 0.75 * old + 0.25 * fast)


def test_a_teacher_without_weights_of_its_own_starts_as_the_student_that_was_given_some():
    method = teacher()
    method.after_init(["encoder", "projector", "teacher_projector"])
    assert torch.equal(method.teacher_encoder[1].weight, method.encoder[1].weight)
    assert not torch.equal(method.teacher_projector[0].weight, method.projector[0].weight)


def train(method, steps=40):
    """Train on noisy views of digits; returns the mean cosine between images' embeddings, and their effective rank."""
    images = torch.tensor(load_digits().images[:256] / 16, dtype=torch.float32)[:, None].repeat(1, 3, 1, 1)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    for step in range(steps):
        rows = torch.arange(64) + 64 * (step % 4)
        outcome = method(*(images[rows] + 0.2 * torch.randn(2, 64, 3, 8, 8)))
        optimizer.zero_grad()
        outcome.loss.backward()
        optimizer.step()
        method.after_step(1.0)
        if method.support is not None:
            method.support.update(outcome.embeddings, rows, rows % 10)
    with torch.no_grad():
        unit = normalize(method.projector(method.encoder(images)), dim=1)
    cosine = (unit @ unit.T)[~torch.eye(256, dtype=bool)].mean().item()
    return cosine, effective_rank(unit)


def on_digits(kind, support, **settings):
    encoder = models.ResNetTiny("small")
    common = {"momentum": 0.99, "predictor_hidden": 64}
    if kind is ReSSL:
        objective = schema.ReSSL("relation", **common, teacher_temperature=0.04, student_temperature=0.1)
    else:
        objective = schema.MNN("teacher", **(common | {"neighbours": 1} | settings))
    return kind(Parts(encoder, models.projector(128, [32], 16, final_norm=False), 128, 16, support), objective)


def evolving():
    return Evolving(Space(16, 10, TorchSearch()), size=40, start=20, penalty=0.001, every=5)


@pytest.mark.parametrize(
    ("kind", "support", "settings"),
    [
        (MNN, None, {}),
        (MNN, Queue(128, 16, TorchSearch()), {"neighbours": 5}),
        (MNN, KMeans(20, 16, 10, TorchSearch()), {}),
        (MNN, None, {"decorrelation": 0.05}),
        (ReSSL, Queue(128, 16, TorchSearch()), {}),
        (ReSSL, KMeans(20, 16, 10, TorchSearch()), {}),
        (MNN, evolving(), {}),
        (ReSSL, evolving(), {}),
    ],
    ids=["byol", "queue", "prototypes", "decorrelation", "relation-queue", "relation-prototypes", "evolving", "both"],
)
def test_the_embeddings_do_not_collapse(kind, support, settings):
    cosine, rank = train(on_digits(kind, support, **settings))
    assert cosine < 0.7
    assert rank > 4


def test_without_predictor_and_teacher_they_would_collapse():
    """`test_the_embeddings_do_not_collapse` would notice a collapse."""

    class Collapsing(MNN):
        def forward(self, view1, view2):
            h1, h2 = self.encoder(view1), self.encoder(view2)
            z1, z2 = self.projector(h1), self.projector(h2)
            loss = 2 - 2 * torch.cosine_similarity(z1, z2).mean()
            return Output(loss, torch.cat([h1, h2]).detach(), z2.detach(), None)

    cosine, _ = train(on_digits(Collapsing, None))
    assert cosine > 0.9
