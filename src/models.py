"""Encoders and heads, batch norms, and the precision in which they compute.

An encoder maps images [B, 3, S, S] to features [B, F].
"""

from __future__ import annotations

import itertools
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.errors import UsageError
from src.system.redact import one_line

Stem = Literal["small", "small_padded", "large"]
BatchNorm = TypeVar("BatchNorm", bound=nn.modules.batchnorm._BatchNorm)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast to ``dtype``; disabled for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype as configs and records have it, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def _small_stem(width: int, stem: Stem) -> nn.Conv2d:
    return nn.Conv2d(3, width, kernel_size=3, padding=2 if stem == "small_padded" else 1, bias=False)


def resnet(name: Literal["resnet18", "resnet34", "resnet50"], stem: Stem) -> nn.Module:
    """Build torchvision's ResNet without its classifier.

    Args:
        name: the ResNet to build.
        stem: ``small``, for 32x32 images: a 3x3 convolution with stride 1 and no max-pool; ``small_padded``: the same
            with padding 2, as in the original study and in solo-learn; ``large``: the usual 7x7 convolution with
            stride 2, and a max-pool.

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016; the small stem as in Chen et al.,
    "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020, appendix B.9.
    """
    import torchvision

    model = getattr(torchvision.models, name)(weights=None)
    if stem != "large":
        # torchvision initialises its own convolutions in this way; this one replaces one of them afterwards.
        model.conv1 = _small_stem(64, stem)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    model.fc = nn.Identity()
    return model


class ResNetTiny(nn.Module):
    """A ResNet with one of torchvision's basic blocks in each stage, 16 to 128 channels wide: 0.3 million weights."""

    def __init__(self, stem: Stem) -> None:
        super().__init__()
        from torchvision.models.resnet import BasicBlock, conv1x1

        is_large = stem == "large"
        conv = nn.Conv2d(3, 16, kernel_size=7, stride=2, padding=3, bias=False) if is_large else _small_stem(16, stem)
        first: list[nn.Module] = [conv, nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
        if is_large:
            first.append(nn.MaxPool2d(kernel_size=3, stride=2, padding=1))
        blocks: list[nn.Module] = [BasicBlock(16, 16)]
        for before, width in itertools.pairwise((16, 32, 64, 128)):
            shortcut = nn.Sequential(conv1x1(before, width, stride=2), nn.BatchNorm2d(width))
            blocks.append(BasicBlock(before, width, stride=2, downsample=shortcut))
        self.layers = nn.Sequential(*first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def timm_model(name: str, options: dict[str, Any]) -> nn.Module:
    """Build any timm model, untrained and without its classifier.

    Raises:
        UsageError: timm does not know the name, or the model refuses an option.
    """
    import timm

    if not timm.is_model(name):
        near = timm.list_models(f"*{name}*")[:5]
        hint = f"; near to it are {', '.join(near)}" if near else ""
        raise UsageError(f"backbone.name={name}: timm has no such model{hint}")
    if taken := {"pretrained", "num_classes"} & options.keys():
        raise UsageError(
            f"backbone.options.{min(taken)}: is not to be set; leave it out (init=FILE has weights: docs/library.md)"
        )
    try:
        return timm.create_model(name, pretrained=False, num_classes=0, **options)
    except Exception as error:  # of any type, if the model does not know a tag or an option
        what = (
            f"backbone.options={options}: {name} does not take them" if options else f"backbone.name={name}: timm fails"
        )
        raise UsageError(f"{what} ({one_line(error)})") from error


def projector(in_dim: int, hidden: list[int], out: int, *, final_norm: bool = True) -> nn.Sequential:
    """Build linear layers, each followed by batch norm, with ReLU between them and none after the last.

    Without ``final_norm`` the last layer has a bias instead of batch norm, as in BYOL.

    Source: Dwibedi et al., ICCV 2021, section 4.1, where the last batch norm has no ReLU either.
    """
    layers: list[nn.Module] = []
    for before, width in itertools.pairwise([in_dim, *hidden, out]):
        layers += [nn.Linear(before, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
    if final_norm:
        return nn.Sequential(*layers[:-1])
    return nn.Sequential(*layers[:-3], nn.Linear([in_dim, *hidden][-1], out))


def convert_batch_norm(module: nn.modules.batchnorm._BatchNorm, kind: type[BatchNorm]) -> BatchNorm:
    """Make a batch norm of another class with the same settings, weights and running statistics."""
    made = kind(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
    made.load_state_dict(module.state_dict())
    return made.train(module.training)


class SplitBatchNorm(nn.BatchNorm2d):
    """Batch norm that normalises each of ``splits`` equal parts of the batch by itself, as several GPUs would.

    The running statistics are the means of the parts' running statistics.

    Source: Hoffer et al., "Train longer, generalize better", NeurIPS 2017, section 4 ("ghost batch normalization");
    the name is from He et al., "Momentum Contrast", CVPR 2020, and its code for CIFAR.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float
    splits = 1

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, C, H, W]; in training mode B must be a multiple of ``splits``."""
        if not self.training or self.splits == 1:
            return super().forward(x)
        return self._forward_fused(x) if torch.compiler.is_compiling() else self._forward_parts(x)

    def _forward_parts(self, x: Tensor) -> Tensor:
        """Normalise with one call for each part, whose kernels need neither copies nor float32 intermediates."""
        means, variances = (each.repeat(self.splits, 1) for each in (self.running_mean, self.running_var))
        normal = [
            F.batch_norm(part, mean, variance, self.weight, self.bias, True, self.momentum, self.eps)
            for part, mean, variance in zip(x.chunk(self.splits), means, variances, strict=True)
        ]
        self._set_running(means.mean(0), variances.mean(0))
        return torch.cat(normal)

    def _forward_fused(self, x: Tensor) -> Tensor:
        """Compute the same up to rounding in one expression, for torch.compile.

        With `_forward_parts` the graph of a ResNet would be ``splits`` times as large.
        """
        parts = x.unflatten(0, (self.splits, -1)).float()
        variance, mean = torch.var_mean(parts, (1, 3, 4), correction=0, keepdim=True)
        normal = (parts - mean) * (variance + self.eps).rsqrt()
        if self.affine:
            normal = normal * self.weight[:, None, None] + self.bias[:, None, None]
        count = parts[0].numel() // self.num_features
        self._set_running(
            self.running_mean.lerp(mean.detach().mean(0).flatten(), self.momentum),
            self.running_var.lerp(variance.detach().mean(0).flatten() * count / (count - 1), self.momentum),
        )
        return normal.flatten(0, 1).to(x.dtype)

    def _set_running(self, mean: Tensor, variance: Tensor) -> None:
        self.running_mean.copy_(mean)
        self.running_var.copy_(variance)
        self.num_batches_tracked += 1


def split_batch_norms(module: nn.Module, splits: int) -> None:
    """Replace every batch norm by a `SplitBatchNorm`; the keys of the state dict stay the same.

    Raises:
        UsageError: the module has no batch norm, or one that is not a plain ``BatchNorm2d`` with momentum and running
            statistics.
    """
    found = {name: each for name, each in module.named_modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)}
    other = [
        type(each).__name__
        for each in found.values()
        if not (type(each) is nn.BatchNorm2d and each.momentum is not None and each.track_running_stats)
    ]
    if other or not found:
        what = f"its {other[0]} cannot be split" if other else "it has no batch norm"
        raise UsageError(f"backbone.bn_splits={splits}: {what}; choose backbone.bn_splits=1")
    for name, each in found.items():
        split = convert_batch_norm(each, SplitBatchNorm)
        split.splits = splits
        module.set_submodule(name, split)


def predictor(dim: int, hidden: int) -> nn.Sequential:
    """Build linear, batch norm, ReLU and linear layers, from ``dim`` to ``dim`` dimensions.

    Source: Dwibedi et al., ICCV 2021, section 4.1.
    """
    return nn.Sequential(
        nn.Linear(dim, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim)
    )


@torch.no_grad()
def feature_dim(encoder: nn.Module, image_size: int) -> int:
    """Measure F, the number of an encoder's features, since not every timm model returns as many as it declares.

    Raises:
        UsageError: the encoder does not accept images of this size, or does not return one vector for each.
    """
    training = encoder.training
    try:
        shape = tuple(encoder.eval()(torch.zeros(1, 3, image_size, image_size)).shape)
    except Exception as error:  # its type depends on the model
        reason = one_line(error)
        raise UsageError(f"backbone: does not take images of data.image_size={image_size} ({reason})") from error
    finally:
        encoder.train(training)
    if len(shape) != 2:
        raise UsageError(f"backbone: gives {list(shape)} of one image, where [1, features] is needed")
    return shape[1]
