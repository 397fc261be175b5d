"""Augmented views of a batch of images, computed for the whole batch at once on its device, every image with its own draws.

Source: the operations of SimCLR (Chen et al. 2020, appendix A) and BYOL's solarization (Grill et al. 2020, appendix B),
each as torchvision computes it on float images. Deviation from its 8-bit images: nothing is rounded between operations,
and the crop is clamped to [0, 1], because a bicubic resize overshoots.

Shape suffixes: B images, C = 3 channels, H and W height and width of an image, S side of a view, N pixels along one axis
of an image, T taps of the blur; 1 an axis to broadcast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.config import View

CONTRAST, SATURATION, HUE = 1, 2, 3  # brightness is 0
CROP_ATTEMPTS, CROP_RATIO = 10, (3 / 4, 4 / 3)
SOLARIZE_FROM = 0.5
Kernel = Callable[[Tensor], Tensor]


class Params(NamedTuple):
    """All random draws of one view of a batch, float32. An image that is spared an operation holds its neutral value."""

    box_B4: Tensor  # the crop: top, left, height, width, in whole pixels
    flip_B1: Tensor  # 0 or 1
    order_B4: Tensor  # which operation of the colour jitter comes 1st, 2nd, ...: a permutation of 0, 1, 2, 3
    factors_B4: Tensor  # brightness, contrast, saturation (neutral 1) and the shift of the hue in turns (neutral 0)
    grey_B1: Tensor  # 0 or 1
    sigma_B1: Tensor  # of the Gaussian blur, in pixels (neutral 0)
    solarize_B1: Tensor  # 0 or 1


class ViewMaker(nn.Module):
    """Makes one view of every image of a batch.

    Args:
        view: Probabilities and strengths. An operation of probability 0 costs nothing.
        interpolation: ``bicubic`` or ``bilinear``, both antialiased.
        image_size: S, in pixels.
        mean: Of each channel of the data set, in [0, 1].
        std: Of each channel of the data set, in [0, 1].
    """

    mean_C11: Tensor
    std_C11: Tensor
    taps_SST: Tensor

    def __init__(
        self, view: View, interpolation: str, image_size: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.view, self.kernel, self.image_size = view, KERNELS[interpolation], image_size
        self.register_buffer("mean_C11", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std_C11", torch.tensor(std).view(-1, 1, 1), persistent=False)
        # Entry [j, i, t] is 1 where tap t of output pixel i reads input pixel j: an identity, padded, tells.
        radius = min(math.ceil(3 * view.blur_sigma[1]), image_size - 1)
        identity_SN = F.pad(torch.eye(image_size)[None], (radius, radius), mode="reflect")[0]
        self.register_buffer("taps_SST", identity_SN.unfold(1, 2 * radius + 1, 1), persistent=False)

    def draw(self, batch_size: int, height: int, width: int, device: torch.device | str) -> Params:
        """Draws from torch's default generator, on the CPU, so that a run's views do not depend on its device."""
        v = self.view

        def chosen(probability: float) -> Tensor:
            return torch.rand(batch_size, 1) < probability

        ranges = [(max(0.0, 1 - s), 1 + s) for s in (v.brightness, v.contrast, v.saturation)] + [(-v.hue, v.hue)]
        low_4, high_4 = torch.tensor(ranges).T
        factors_B4 = low_4 + (high_4 - low_4) * torch.rand(batch_size, 4)
        params = Params(
            box_B4=draw_boxes(batch_size, height, width, v.crop_scale),
            flip_B1=chosen(v.flip),
            order_B4=torch.rand(batch_size, 4).argsort(1),
            factors_B4=torch.where(chosen(v.jitter), factors_B4, torch.tensor([1.0, 1.0, 1.0, 0.0])),
            grey_B1=chosen(v.grey),
            sigma_B1=chosen(v.blur) * torch.empty(batch_size, 1).uniform_(*v.blur_sigma),
            solarize_B1=chosen(v.solarize),
        )
        # One copy for all of them, which the host does not wait for.
        packed = torch.cat([p.float() for p in params], 1).to(device, non_blocking=True)
        return Params(*packed.split([p.shape[1] for p in params], 1))

    def apply(self, images_BCHW: Tensor, params: Params) -> Tensor:
        """Computes the views that the draws describe; a pure function of its arguments.

        Args:
            images_BCHW: uint8, on the device of this module.
            params: From `draw`, on the same device.

        Returns:
            [B, C, S, S] float32, normalised.
        """
        v, S = self.view, self.image_size
        H, W = images_BCHW.shape[2:]
        top, left, height, width = params.box_B4.split(1, 1)
        with torch.autocast(images_BCHW.device.type, enabled=False):
            rows_BSH = resampling(top, height, torch.zeros_like(top), H, S, self.kernel)
            columns_BSW = resampling(left, width, params.flip_B1, W, S, self.kernel)
            x = along_both_axes(images_BCHW / 255, rows_BSH, columns_BSW).clamp_(0, 1)
            if v.jitter:
                x = jitter_colours(x, params.order_B4, params.factors_B4, hue=v.hue > 0)
            if v.grey:
                x = torch.lerp(x, luma(x), _per_image(params.grey_B1))
            if v.blur:
                blur_BSS = blurring(params.sigma_B1, self.taps_SST)
                x = along_both_axes(x, blur_BSS, blur_BSS)
            if v.solarize:
                threshold = torch.where(params.solarize_B1 > 0, SOLARIZE_FROM, torch.inf)
                x = torch.where(x >= _per_image(threshold), 1 - x, x)
            return (x - self.mean_C11) / self.std_C11

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Draws and applies: [B, C, H, W] uint8 to [B, C, S, S] float32, normalised."""
        B, _, H, W = images_BCHW.shape
        return self.apply(images_BCHW, self.draw(B, H, W, images_BCHW.device))


def normalise(images_BCHW: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """For evaluation: uint8 images to float32 of zero mean and unit variance over the data set, nothing else."""
    mean_C11, std_C11 = torch.tensor([mean, std], device=images_BCHW.device)[..., None, None]
    return (images_BCHW / 255 - mean_C11) / std_C11


def draw_boxes(batch_size: int, height: int, width: int, scale: Sequence[float]) -> Tensor:
    """Random resized crops as torchvision draws them.

    Area uniform in ``scale`` (relative to the image), aspect ratio log-uniform, the first of ten attempts that fits, and
    failing all ten the largest centred box of a legal ratio.

    Returns:
        [B, 4] float32: top, left, height, width, in whole pixels.
    """
    shape = (batch_size, CROP_ATTEMPTS)
    area = height * width * torch.empty(shape).uniform_(*scale)
    ratio = torch.empty(shape).uniform_(*map(math.log, CROP_RATIO)).exp()
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)
    w, h, fits = w.gather(1, first), h.gather(1, first), fits.gather(1, first)
    top = (torch.rand(batch_size, 1) * (height - h + 1)).floor()
    left = (torch.rand(batch_size, 1) * (width - w + 1)).floor()

    centred_w = min(width, round(height * CROP_RATIO[1]))
    centred_h = min(height, round(width / CROP_RATIO[0]))
    centred = torch.tensor([(height - centred_h) // 2, (width - centred_w) // 2, centred_h, centred_w])
    return torch.where(fits, torch.cat([top, left, h, w], 1), centred.float())


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution, a = -1/2, of width 4."""
    x = x.abs().clamp(max=2)
    return torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2)


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


KERNELS: dict[str, Kernel] = {"bicubic": _cubic, "bilinear": _triangle}


def resampling(start_B1: Tensor, length_B1: Tensor, flip_B1: Tensor, N: int, S: int, kernel: Kernel) -> Tensor:
    """Crop, antialiased resize and flip along one axis, as a matrix for every image.

    The kernel widens where the crop shrinks. Taps outside the crop are dropped and the rest sum to 1.

    Returns:
        [B, S, N] float32, rows that sum to 1.
    """
    scale = length_B1 / S
    forth = torch.arange(S, device=start_B1.device) + 0.5
    centre_BS = start_B1 + scale * torch.where(flip_B1 > 0, S - forth, forth)
    pixel_N = torch.arange(N, device=start_B1.device) + 0.5
    inside_BN = (pixel_N > start_B1) & (pixel_N < start_B1 + length_B1)
    distance_BSN = (pixel_N - centre_BS[..., None]) / scale.clamp(min=1)[..., None]
    weights_BSN = kernel(distance_BSN) * inside_BN[:, None]
    return weights_BSN / weights_BSN.sum(2, keepdim=True)


def blurring(sigma_B1: Tensor, taps_SST: Tensor) -> Tensor:
    """Gaussian blur along one axis, reflected at the borders, as a matrix for every image; the identity for sigma 0.

    Returns:
        [B, S, S] float32, rows that sum to 1.
    """
    radius = taps_SST.shape[2] // 2
    offset_T = torch.arange(-radius, radius + 1, device=sigma_B1.device)
    kernel_BT = (-0.5 * (offset_T / sigma_B1.clamp(min=0.01)) ** 2).softmax(1)
    return torch.einsum("bt,jit->bij", kernel_BT, taps_SST)


def along_both_axes(x: Tensor, rows_BSH: Tensor, columns_BSW: Tensor) -> Tensor:
    """[B, C, H, W] to [B, C, S, S]: every channel becomes rows @ channel @ columns.T, with matrices of its image's own."""
    for matrix in (columns_BSW, rows_BSH):  # each turn transposes the image, two turns restore it
        x = (x.flatten(1, 2) @ matrix.mT).unflatten(1, x.shape[1:3]).mT
    return x


def luma(x: Tensor) -> Tensor:
    """Grey of ITU-R BT.601: [B, 3, S, S] to [B, 1, S, S]."""
    r, g, b = x.split(1, 1)
    return 0.2989 * r + 0.587 * g + 0.114 * b


def jitter_colours(x: Tensor, order_B4: Tensor, factors_B4: Tensor, hue: bool) -> Tensor:
    """Brightness, contrast, saturation and hue in every image's own order.

    The hue, by far the costliest, is shifted once for the whole batch: before it come the operations that precede it in
    their image's order, after it the others, and an image with nothing to do at its turn is blended with factor 1.
    """
    operations = order_B4.long()
    factors = factors_B4.gather(1, operations)
    is_hue = operations == HUE
    after_hue = is_hue.cumsum(1) > 0
    for turn in range(3):
        x = _blend(x, operations[:, turn], torch.where(after_hue[:, turn], 1, factors[:, turn]))
    if hue:
        x = shift_hue(x, factors_B4[:, HUE:])
    for turn in range(1, 4):
        active = after_hue[:, turn] & ~is_hue[:, turn]
        x = _blend(x, operations[:, turn], torch.where(active, factors[:, turn], 1))
    return x


def _blend(x: Tensor, operation_B: Tensor, factor_B: Tensor) -> Tensor:
    """Away from (or towards) black for brightness, the mean grey for contrast, each pixel's grey for saturation."""
    operation, grey = _per_image(operation_B), luma(x)
    base = (operation == SATURATION) * grey + (operation == CONTRAST) * grey.mean((2, 3), keepdim=True)
    return torch.lerp(base, x, _per_image(factor_B)).clamp_(0, 1)


def shift_hue(x: Tensor, turns_B1: Tensor) -> Tensor:
    """Turns the hue of the HSV hexcone; images of shift 0 stay exactly as they are.

    Source: Smith 1978, "Color gamut transform pairs", with the way back as one piecewise linear function a channel.
    """
    r, g, b = x.split(1, 1)
    value = r.maximum(g).maximum(b)
    chroma = value - r.minimum(g).minimum(b)
    divisor = 6 * chroma.clamp(min=1e-12)  # grey has chroma 0, and its hue then makes no difference
    hue = torch.where(value == g, (b - r) / divisor + 1 / 3, (r - g) / divisor + 2 / 3)
    hue = torch.where(value == r, (g - b) / divisor, hue)
    # A channel is full within a sextant of its own hue, and gone from two sextants on.
    own_C11 = torch.arange(3, device=x.device)[:, None, None] / 3
    distance = hue + _per_image(turns_B1) - own_C11
    distance = (distance - distance.round()).abs_()
    turned = value - chroma * (6 * distance - 1).clamp_(0, 1)
    return torch.lerp(x, turned, (_per_image(turns_B1) != 0).float())


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
