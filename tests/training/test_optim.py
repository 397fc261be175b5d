import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from src.config import schema
from src.training import optim

COSINE = schema.Schedule("cosine", warmup_epochs=1)


def lars_by_hand(weight, gradients, lr, decay, trust, clip):
    """LARS (You et al. 2017); with ``clip``, as in LARC, a step is never larger than one of plain SGD."""
    weight, velocity = weight.clone(), torch.zeros_like(weight)
    for gradient in gradients:
        ratio = trust * weight.norm() / (gradient.norm() + decay * weight.norm())
        if clip:
            ratio = min(ratio / lr, torch.tensor(1.0))
        velocity = 0.9 * velocity + ratio * (gradient + decay * weight)
        weight = weight - lr * velocity
    return weight


@pytest.mark.parametrize("clip", [True, False])
def test_lars_is_its_paper_on_weights_and_sgd_on_biases(clip):
    cfg = schema.Optimizer("lars", lr=0.4, scale_lr=True, weight_decay=0.01, trust_coefficient=0.02, clip_trust=clip)
    layer = nn.Linear(4, 3)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    optimizer = optim.build(cfg, layer, batch_size=512)
    gradients = torch.randn(5, 3, 4), torch.randn(5, 3)
    for weight_gradient, bias_gradient in zip(*gradients, strict=True):
        layer.weight.grad, layer.bias.grad = weight_gradient.clone(), bias_gradient.clone()
        optimizer.step()
    lr = 0.4 * 512 / 256
    torch.testing.assert_close(layer.weight.detach(), lars_by_hand(weight, gradients[0], lr, 0.01, 0.02, clip))
    velocity = torch.zeros(3)
    for gradient in gradients[1]:
        velocity = 0.9 * velocity + gradient
        bias = bias - lr * velocity
    torch.testing.assert_close(layer.bias.detach(), bias)


def test_normalisation_and_biases_do_not_decay():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    decayed, spared = optim.parameter_groups(net, 0.1)
    assert [p.ndim for p in decayed["params"]] == [4, 2]
    assert [p.ndim for p in spared["params"]] == [1, 1, 1, 1]
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)


def test_with_decay_all_everything_decays():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    before = [parameter.detach().clone() for parameter in net.parameters()]
    cfg = schema.Optimizer("sgd", lr=0.5, scale_lr=False, weight_decay=0.1, decay_all=True)
    optimizer = optim.build(cfg, net, 256)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, was in zip(net.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), 0.95 * was)


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_an_optimizer_has_the_rates_decays_and_momenta_that_are_asked_for(name):
    cfg = schema.Optimizer(name, lr=0.2, scale_lr=False, weight_decay=0.3, momentum=0.7, betas=[0.8, 0.95])
    groups = optim.build(cfg, nn.Linear(2, 2), batch_size=512).param_groups
    key, value = ("betas", (0.8, 0.95)) if name == "adamw" else ("momentum", 0.7)
    assert [(group["lr"], group["weight_decay"], group[key]) for group in groups] == [
        (0.2, 0.3, value),
        (0.2, 0, value),
    ]


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_every_optimizer_goes_downhill(name):
    net = nn.Linear(8, 8)
    optimizer = optim.build(schema.Optimizer(name, lr=0.01, scale_lr=False, weight_decay=1e-4), net, 256)
    x = torch.randn(32, 8)

    def loss():
        return net(x).square().mean()

    before = loss().item()
    for _ in range(20):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < before


def test_cosine_closed_form():
    def factor(step):
        return optim.schedule(COSINE, step, total_steps=110, warmup_steps=10)

    assert [factor(step) for step in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]
    assert factor(60) == pytest.approx(0.5)
    assert factor(35) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert 0 < factor(109) < 0.001


def test_step_and_constant():
    step = schema.Schedule("step", warmup_epochs=0, milestones=[0.5, 0.75], gamma=0.1)
    factors = [optim.schedule(step, at, total_steps=100, warmup_steps=0) for at in (0, 49, 50, 74, 75, 99)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    twentieths = [replace(step, milestones=[share / 20]) for share in range(1, 20)]
    first = [next(at for at in range(100) if optim.schedule(each, at, 100, 0) < 1) for each in twentieths]
    assert first == list(range(5, 100, 5))
    constant = schema.Schedule("constant", warmup_epochs=0)
    assert {optim.schedule(constant, at, 100, 0) for at in range(100)} == {1.0}


@given(total=st.integers(1, 500), warmup=st.integers(0, 600), data=st.data())
def test_a_factor_never_leaves_its_range(total, warmup, data):
    at = data.draw(st.integers(0, total - 1))
    for name in ("cosine", "constant", "step"):
        cfg = schema.Schedule(name, warmup_epochs=0, milestones=[0.5])
        assert 0 <= optim.schedule(cfg, at, total, warmup) <= 1
