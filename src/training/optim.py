"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import Optimizer

from src.config import schema


def parameter_groups(module: nn.Module, weight_decay: float, *, decay_all: bool = False) -> list[dict]:
    """Group parameters so that weight decay, and LARS's adaptation, spares biases and normalisation layers.

    With ``decay_all`` it applies to all parameters.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    if decay_all:
        return [{"params": parameters, "weight_decay": weight_decay}]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def build(cfg: schema.Optimizer, module: nn.Module, batch_size: int) -> Optimizer:
    """Build the optimizer over all of a module's parameters that require a gradient.

    LARS adapts only parameters with a weight decay above 0 (timm's rule), so without any it is SGD with momentum.

    Source: You et al., "Large Batch Training of Convolutional Networks", 2017 (LARS); the linear scaling of the
    learning rate: Goyal et al., "Accurate, Large Minibatch SGD", 2017.
    """
    groups = parameter_groups(module, cfg.weight_decay, decay_all=cfg.decay_all)
    lr = cfg.lr * batch_size / 256 if cfg.scale_lr else cfg.lr
    match cfg.name:
        case "lars":
            from timm.optim import Lars

            return Lars(
                groups, lr=lr, momentum=cfg.momentum, trust_coeff=cfg.trust_coefficient, trust_clip=cfg.clip_trust
            )
        case "sgd":
            return torch.optim.SGD(groups, lr=lr, momentum=cfg.momentum)
        case _:
            return torch.optim.AdamW(groups, lr=lr, betas=(cfg.betas[0], cfg.betas[1]))


def schedule(cfg: schema.Schedule, step: int, total_steps: int, warmup_steps: int) -> float:
    """The factor on the learning rate at a step, counted from 0: a pure function, so that a resume needs no state.

    Linear warm-up reaches 1 at step ``warmup_steps - 1``. After it come a half cosine to 0 at ``total_steps``, a
    constant 1, or a factor of ``gamma`` for each milestone passed.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    match cfg.name:
        case "cosine":
            return (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps))) / 2
        case "constant":
            return 1.0
        case _:
            # 0.55 of 100 steps is a little more than 55 in binary floats.
            return cfg.gamma ** sum(step >= share * total_steps - 1e-6 for share in cfg.milestones)
