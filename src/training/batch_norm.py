"""Batch norm over the rows of all ranks of a run, for CPUs; on GPUs torch's own is used."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

from src.errors import UsageError
from src.models import convert_batch_norm
from src.system.collectives import all_reduce_sum_


class _Sum(Function):
    """The sum over the ranks. The backward pass is a sum too: every rank's result depends on this rank's value."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:  # noqa: ARG004
        return all_reduce_sum_(own.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm with the statistics of all ranks' rows, like `torch.nn.SyncBatchNorm`, which refuses CPUs.

    All ranks must have the same number of rows. The arithmetic is float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise this rank's rows [B, C, ...]."""
        if not self.training:
            return super().forward(x)
        wide = x.float()
        axes = [axis for axis in range(x.ndim) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(x.ndim)]
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean = _Sum.apply(wide.sum(axes)) / count
        centred = wide - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(axes)) / count
        if self.track_running_stats:
            self._track(mean.detach(), variance.detach() * count / (count - 1))
        normal = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        rate = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, rate)
        self.running_var.lerp_(variance, rate)

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - torch's name
        pass


def replace_batch_norms(module: nn.Module) -> None:
    """Replace every batch norm inside a module by a `GlobalBatchNorm`; the keys of its state dict stay the same.

    Raises:
        UsageError: the module has a batch norm that is not one of torch's plain classes.
    """
    for name, child in module.named_children():
        if not isinstance(child, nn.modules.batchnorm._BatchNorm):
            replace_batch_norms(child)
        elif type(child) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            setattr(module, name, convert_batch_norm(child, GlobalBatchNorm))
        else:
            raise UsageError(
                f"backbone: its {type(child).__name__} cannot span several CPU processes; train with one, or on GPUs"
            )
