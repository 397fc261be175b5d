"""Fine-tuning: the whole network, with the encoder as its start, learns from labels.

Shapes: B batch, C classes, N images.
"""

from __future__ import annotations

import copy
import logging

import torch
import torch.nn.functional as F
from torch import nn

from src.config import schema
from src.data import Dataset
from src.data.splits import Split, held_out_tenth
from src.errors import Diverged
from src.evaluation.probes import BLOCK, FrozenEncoder, cropped_batches, topk_percent
from src.models import SplitBatchNorm, autocast

logger = logging.getLogger(__name__)


def fine_tune(
    frozen: FrozenEncoder, train: Split, classes: int, lr: float, cfg: schema.Finetune, seed: int
) -> FrozenEncoder:
    """Train a copy of the encoder, with a linear classifier on top, on labelled images.

    The optimizer is SGD with Nesterov momentum 0.9 and no weight decay; the learning rate falls to 0 along a half
    cosine. Images are cropped and flipped at random. The classifier starts at 0.

    Source: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020, appendix B
    (fine-tuning). Deviations: the learning rate falls along a cosine, without warm-up, and the length is given in
    epochs, not in steps.

    Returns:
        A `FrozenEncoder` whose features are the logits [B, C]. The encoder passed in is unchanged.

    Raises:
        Diverged: the loss stopped being finite.
    """
    features = frozen.features(train.take(torch.arange(1))).x_NF.shape[1]
    classifier = nn.Linear(features, classes, device=frozen.device)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    network = nn.Sequential(copy.deepcopy(frozen.encoder), classifier).train()
    network.requires_grad_()  # the weights of a teacher have no gradient so far
    for module in network.modules():
        if isinstance(module, SplitBatchNorm):
            module.splits = 1  # only pre-training splits the batch

    batch_size = min(cfg.batch_size, len(train))
    batches = cropped_batches(frozen, train, batch_size, seed)
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cfg.epochs * (len(train) // batch_size))
    for epoch in range(cfg.epochs):
        for views, labels_B in batches(epoch):
            views = views.contiguous(memory_format=torch.channels_last)
            with autocast(frozen.device, frozen.dtype):
                logits_BC = network(views)
            loss = F.cross_entropy(logits_BC.float(), labels_B)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if not loss.isfinite():
            raise Diverged(f"fine-tuning diverged at a learning rate of {lr:g}")
    return frozen.of(network.eval())


def fine_tuning(frozen: FrozenEncoder, data: Dataset, cfg: schema.Finetune, seed: int) -> dict[str, float]:
    """Fine-tune with the best learning rate: ``test/finetune_top1`` and ``test/finetune_top5`` in percent.

    The learning rate is chosen on the validation images, and ``val/finetune_top1`` is returned too. With ``data.final``
    it is chosen on a tenth of the training images, and the network then learns from all of them. If every learning rate
    diverges, or that last training does, a warning is logged and the result is empty.
    """
    classes, fit, choose = len(data.classes), data.probe, data.val
    if choose is None:
        rows, held_out = held_out_tenth(fit.labels, seed)
        fit, choose = data.probe.take(rows), data.probe.take(held_out)
    tuned, best_lr, best = None, 0.0, -1.0
    for lr in cfg.lr:
        try:
            candidate = fine_tune(frozen, fit, classes, lr, cfg, seed)
            (top1,) = topk_percent(map(candidate.features, choose.blocks(BLOCK)), 1)
        except Diverged:
            continue
        if top1 > best:
            tuned, best_lr, best = candidate, lr, top1
    try:
        if data.val is None and tuned is not None:
            tuned = fine_tune(frozen, data.probe, classes, best_lr, cfg, seed)
        test = topk_percent(map(tuned.features, data.test.blocks(BLOCK)), 1, 5) if tuned is not None else []
    except Diverged:
        test = []
    if not test:
        logger.warning("evaluation.finetune.lr=%s: fine-tuning diverges, so its figures are left out; lower it", cfg.lr)
        return {}
    chosen = {} if data.val is None else {"val/finetune_top1": best}
    return chosen | dict(zip(("test/finetune_top1", "test/finetune_top5"), test, strict=True))
