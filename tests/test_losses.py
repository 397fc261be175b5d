import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from src.losses import barlow_twins, byol, info_nce, mnn, nt_xent, ressl, support_contrast

BATCHES = st.integers(2, 9)
TEMPERATURES = st.floats(0.05, 2)


def nt_xent_by_loops(z1, z2, temperature, positives=None, groups=None):
    """Equation 1 of the SimCLR paper, term by term, in float64; ``positives`` take the place of the other views."""
    z = [row / row.norm() for row in torch.cat([z1, z2]).double()]
    found = z if positives is None else [row / row.norm() for row in torch.cat(positives).double()]
    batch, total = len(z1), 0.0
    for i in range(2 * batch):
        j = (i + batch) % (2 * batch)
        positive = math.exp(float(z[i] @ found[j]) / temperature)
        negatives = [m for m in range(2 * batch) if m not in (i, j) and (groups is None or groups[m] != groups[j])]
        others = sum(math.exp(float(z[i] @ z[m]) / temperature) for m in negatives)
        total -= math.log(positive / (positive + others))
    return total / (2 * batch)


def info_nce_by_loops(positives, predictions, temperature, groups=None):
    """Equation 3 of the NNCLR paper, term by term, in float64; rows of the same group are left out."""
    q = [row / row.norm() for row in positives.double()]
    p = [row / row.norm() for row in predictions.double()]
    total = 0.0
    for i in range(len(q)):
        columns = [k for k in range(len(p)) if groups is None or k == i or groups[k] != groups[i]]
        terms = {k: math.exp(float(q[i] @ p[k]) / temperature) for k in columns}
        total -= math.log(terms[i] / sum(terms.values()))
    return total / len(q)


def some_groups(rows):
    return torch.randint(0, 3, (rows,))


@settings(max_examples=40)
@given(BATCHES, TEMPERATURES, st.booleans(), st.booleans())
def test_nt_xent_is_its_equation(batch, temperature, with_positives, with_groups):
    z1, z2 = torch.randn(2, batch, 5)
    positives = tuple(torch.randn(2, batch, 5)) if with_positives else None
    groups = some_groups(2 * batch) if with_groups else None
    expected = nt_xent_by_loops(z1, z2, temperature, positives, groups)
    assert nt_xent(z1, z2, temperature, positives, groups).item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@settings(max_examples=30)
@given(BATCHES, TEMPERATURES, st.booleans())
def test_info_nce_is_its_equation(batch, temperature, with_groups):
    q, p = torch.randn(2, batch, 5)
    groups = some_groups(batch) if with_groups else None
    expected = info_nce_by_loops(q, p, temperature, groups)
    assert info_nce(q, p, temperature, groups).item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_closed_forms(temperature):
    """Equal views, all rows orthogonal: the positive scores 1, every negative 0."""
    z = torch.eye(4)
    e = math.exp(1 / temperature)
    assert nt_xent(z, z, temperature).item() == pytest.approx(-math.log(e / (e + 6)), rel=1e-5, abs=1e-6)
    assert info_nce(z, z, temperature).item() == pytest.approx(-math.log(e / (e + 3)), rel=1e-5, abs=1e-6)


def test_everything_alike_is_chance():
    """If all embeddings are equal, the loss is the logarithm of the number of choices."""
    z = torch.ones(8, 3)
    assert nt_xent(z, z, 0.3).item() == pytest.approx(math.log(15), rel=1e-5)
    assert info_nce(z, z, 0.3).item() == pytest.approx(math.log(8), rel=1e-5)


def test_where_all_are_of_one_group_no_negatives_are_left():
    q, p = torch.randn(2, 6, 4)
    assert info_nce(q, p, 0.1, torch.zeros(6)).item() == 0
    assert nt_xent(q, p, 0.1, mask_ids=torch.zeros(12)).item() == 0


def test_where_all_groups_differ_nothing_changes():
    q, p = torch.randn(2, 6, 4)
    assert torch.equal(info_nce(q, p, 0.1, torch.arange(6)), info_nce(q, p, 0.1))
    assert torch.equal(nt_xent(q, p, 0.1, mask_ids=torch.arange(12)), nt_xent(q, p, 0.1))


def test_with_themselves_as_positives_the_views_have_the_same_loss_and_less_of_a_pull():
    z1, z2 = torch.randn(2, 8, 5)
    leaf = z1.clone().requires_grad_()
    (own,) = torch.autograd.grad(nt_xent(leaf, z2, 0.2), leaf)
    stored = nt_xent(leaf, z2, 0.2, (z1, z2))
    torch.testing.assert_close(stored, nt_xent(z1, z2, 0.2))
    (detached,) = torch.autograd.grad(stored, leaf)
    assert ((own - detached) * z2).sum(1).max() < 0  # a step goes against the gradient: more of it towards z2


def test_support_contrast_is_a_weighted_mean_of_its_terms():
    z1, z2, p1, p2, q1, q2 = torch.randn(6, 8, 5)
    groups = some_groups(16)

    def loss(weight, predictions):
        return support_contrast((z1, z2), predictions, (q1, q2), 0.2, weight, groups)

    predicted = (info_nce(q1, p2, 0.2, groups[:8]) + info_nce(q2, p1, 0.2, groups[8:])) / 2
    assert torch.equal(loss(1, (p1, p2)), predicted)
    torch.testing.assert_close(loss(0.25, (p1, p2)), 0.25 * predicted + 0.75 * nt_xent(z1, z2, 0.2))
    stored = nt_xent(z1, z2, 0.2, (q1, q2), groups)
    assert torch.equal(loss(1, None), stored)
    torch.testing.assert_close(loss(0.25, None), 0.25 * stored + 0.75 * nt_xent(z1, z2, 0.2))


def test_norm_does_not_matter():
    z1, z2 = torch.randn(2, 8, 16)
    scaled = nt_xent(z1 * torch.rand(8, 1).add(0.1), z2 * 7, 0.2)
    assert scaled.item() == pytest.approx(nt_xent(z1, z2, 0.2).item(), rel=1e-5)


@pytest.mark.parametrize("loss", [nt_xent, info_nce])
def test_autocast_changes_neither_the_loss_nor_its_gradient(loss):
    z1, z2 = torch.randn(2, 64, 16)
    results = []
    for enabled in (False, True):
        leaf = z1.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = loss(leaf, z2, 0.1)
        value.backward()
        results.append((value.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize(
    "loss",
    [
        lambda a, b, c: nt_xent(a, b, 0.1, (c, b)),
        lambda a, b, c: info_nce(a, b, 0.1),
        lambda a, b, c: byol(a, b),
        lambda a, b, c: mnn(a, b, c[:, None], torch.linspace(0, 1, len(a))),
        lambda a, b, c: ressl(a, b, F.normalize(c.float(), dim=1), 0.1, 0.04),
        lambda a, b, c: barlow_twins(a, b, 0.02),
    ],
    ids=["nt_xent", "info_nce", "cosine", "teacher", "relation", "correlation"],
)
def test_of_rounded_inputs_under_autocast_a_loss_is_that_of_the_same_numbers_in_float32(loss):
    inputs = torch.randn(3, 64, 16).bfloat16()
    expected = loss(*inputs.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(*inputs)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_gradient_pulls_the_pair_together():
    z1 = torch.randn(8, 4, requires_grad=True)
    z2 = torch.randn(8, 4)
    info_nce(z2, z1, 0.5).backward()
    closer = z1.detach() - 0.1 * z1.grad
    assert info_nce(z2, closer, 0.5) < info_nce(z2, z1, 0.5)
    assert F.cosine_similarity(closer, z2).mean() > F.cosine_similarity(z1, z2).mean()


def test_barlow_twins_is_barlow_twins_loss_by_hand():
    z1, z2 = torch.randn(2, 12, 5) * 3 + 1
    loss = 0.0
    for i in range(5):
        for j in range(5):
            c = torch.corrcoef(torch.stack([z1[:, i], z2[:, j]]))[0, 1].item()
            loss += (1 - c) ** 2 if i == j else 0.08 * c**2
    assert barlow_twins(z1, z2, 0.08).item() == pytest.approx(loss, rel=1e-4)
    q, _ = torch.linalg.qr(torch.cat([torch.ones(12, 1), torch.randn(12, 5)], 1))
    assert barlow_twins(q[:, 1:], 7 * q[:, 1:] - 2, 0.08).item() == pytest.approx(0, abs=1e-3)  # because of eps


def test_relation_is_ressls_loss_by_hand():
    p, t, stored = torch.randn(4, 5), 3 * torch.randn(4, 5), F.normalize(torch.randn(7, 5), dim=1)
    loss = 0.0
    for i in range(4):
        wanted = [math.exp(float(t[i] @ v / t[i].norm()) / 0.04) for v in stored]
        found = [math.exp(float(p[i] @ v / p[i].norm()) / 0.1) for v in stored]
        loss -= sum(w / sum(wanted) * math.log(f / sum(found)) for w, f in zip(wanted, found, strict=True)) / 4
    assert ressl(p, t, stored, 0.1, 0.04).item() == pytest.approx(loss, rel=1e-5)


def test_mnn_is_its_equation_whatever_the_norms():
    p, t, neighbours, shares = torch.randn(4, 5), 3 * torch.randn(4, 5), 2 * torch.randn(4, 3, 5), torch.rand(4)
    loss = 0.0
    for i in range(4):
        unit_p, unit_t = p[i] / p[i].norm(), t[i] / t[i].norm()
        mixtures = [shares[i] * n / n.norm() + (1 - shares[i]) * unit_t for n in neighbours[i]]
        loss += float(2 - 2 * unit_p @ unit_t + sum(2 - 2 * unit_p @ mixture for mixture in mixtures) / 3) / 4
    assert mnn(p, t, neighbours, shares).item() == pytest.approx(loss, rel=1e-5)
