"""Augmented views, computed for a whole batch at once on its device, every image with its own draws.

Source: the operations of SimCLR (Chen et al. 2020, appendix A) and BYOL's solarization (Grill et al. 2020, appendix B),
each as torchvision computes it on float images. Deviation from its 8-bit images: nothing is rounded between operations,
and the crop is clamped to [0, 1], because a bicubic resize overshoots.

Shape suffixes: B images, C = 3 channels, H and W an image's height and width, S the side of a view, N an image's pixels
along one axis, T taps of the blur.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from src.config.schema import View

CONTRAST, SATURATION, HUE = 1, 2, 3  # brightness is 0
CROP_ATTEMPTS, CROP_RATIO = 10, (3 / 4, 4 / 3)
SOLARIZE_FROM = 0.5


class Params(NamedTuple):
    """All draws of one view of a batch, float32. An image that is spared an operation holds the neutral value."""

    box: Tensor  # [B, 4] the crop: top, left, height, width, in whole pixels
    flip: Tensor  # [B, 1] 0 or 1
    order: Tensor  # [B, 4] which operation of the colour jitter comes first, second, ...: a permutation of 0, 1, 2, 3
    factors: Tensor  # [B, 4] brightness, contrast, saturation (neutral 1), and the hue's shift in turns (neutral 0)
    grey: Tensor  # [B, 1] 0 or 1
    sigma: Tensor  # [B, 1] of the Gaussian blur, in pixels (neutral 0)
    solarize: Tensor  # [B, 1] 0 or 1


class ViewMaker:
    """Makes one view of every image of a batch.

    Args:
        view: probabilities and strengths. An operation of probability 0 costs nothing.
        interpolation: ``bicubic`` or ``bilinear``, both antialiased.
        image_size: S, in pixels.
        mean: of each channel of the data set, in [0, 1].
        std: of each channel of the data set, in [0, 1].
        part: which of how many equal parts of a batch the images are. The draws are those of the whole batch.
        compile_mode: in which torch.compile fuses the arithmetic; None: it does not. The draws stay as they are.
    """

    def __init__(
        self,
        view: View,
        interpolation: str,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        part: tuple[int, int] = (0, 1),
        compile_mode: str | None = None,
    ) -> None:
        self.view, self.kernel, self.image_size = view, KERNELS[interpolation], image_size
        self.mean, self.std, self.part = mean, std, part
        self._apply = torch.compile(self.apply, mode=compile_mode) if compile_mode else self.apply

    def draw(
        self, images: int, height: int, width: int, device: torch.device | str, aspects: Tensor | None = None
    ) -> Params:
        """Draw from torch's default generator, on the CPU, so that a run's views do not depend on its devices."""
        v, (number, parts) = self.view, self.part
        batch_size = parts * images

        def chosen(probability: float) -> Tensor:
            return torch.rand(batch_size, 1) < probability

        ranges = [(max(0.0, 1 - s), 1 + s) for s in (v.brightness, v.contrast, v.saturation)] + [(-v.hue, v.hue)]
        low, high = torch.tensor(ranges).T
        factors = low + (high - low) * torch.rand(batch_size, 4)
        params = Params(
            box=draw_boxes(batch_size, height, width, v.crop_scale, aspects),
            flip=chosen(v.flip),
            order=torch.rand(batch_size, 4).argsort(1),
            factors=torch.where(chosen(v.jitter), factors, torch.tensor([1.0, 1.0, 1.0, 0.0])),
            grey=chosen(v.grey),
            sigma=chosen(v.blur) * torch.empty(batch_size, 1).uniform_(*v.blur_sigma),
            solarize=chosen(v.solarize),
        )
        # One copy for all of them, which the host does not wait for.
        own = torch.cat([p.float() for p in params], 1).chunk(parts)[number]
        packed = own.to(device, non_blocking=True)
        return Params(*packed.split([p.shape[1] for p in params], 1))

    def apply(self, images_BCHW: Tensor, params: Params) -> Tensor:
        """Compute the views that the draws describe; a pure function of uint8 images and draws on one device.

        Returns:
            [B, C, S, S] float32, normalised.
        """
        v, S = self.view, self.image_size
        H, W = images_BCHW.shape[2:]
        top, left, height, width = params.box.split(1, 1)
        with torch.autocast(images_BCHW.device.type, enabled=False):
            rows_BSH = resampling(top, height, torch.zeros_like(top), H, S, self.kernel)
            columns_BSW = resampling(left, width, params.flip, W, S, self.kernel)
            x = along_both_axes(images_BCHW / 255, rows_BSH, columns_BSW).clamp_(0, 1)
            if v.jitter:
                x = jitter_colours(x, params.order, params.factors, hue=v.hue > 0)
            if v.grey:
                x = torch.lerp(x, luma(x), _per_image(params.grey))
            if v.blur:
                blur_BSS = blurring(params.sigma, S, math.ceil(3 * v.blur_sigma[1]))
                x = along_both_axes(x, blur_BSS, blur_BSS)
            if v.solarize:
                threshold = torch.where(params.solarize > 0, SOLARIZE_FROM, torch.inf)
                x = torch.where(x >= _per_image(threshold), 1 - x, x)
            return _standardise(x, self.mean, self.std)

    def __call__(self, images_BCHW: Tensor, aspects: Tensor | None = None) -> Tensor:
        """Draw and apply: [B, C, H, W] uint8 to [B, C, S, S] float32, normalised.

        Args:
            images_BCHW: the images.
            aspects: [batch size] on the CPU: width / height that whole images had before they were squeezed into
                squares; None: images as they are.
        """
        B, _, H, W = images_BCHW.shape
        return self._apply(images_BCHW, self.draw(B, H, W, images_BCHW.device, aspects))


def center_crop(images_BCKK: Tensor, aspects: Tensor, size: int) -> Tensor:
    """The middle of whole images that have been squeezed into squares, in the aspect that they had.

    It is what Resize and CenterCrop of the field's recipes show: K pixels along the shorter side, of which S stay.

    Args:
        images_BCKK: uint8.
        aspects: [B] width / height before.
        size: S.

    Returns:
        [B, C, S, S] uint8.
    """
    K, aspect = images_BCKK.shape[-1], aspects[:, None].to(images_BCKK.device)
    upright = torch.zeros_like(aspect)
    height, width = ((size * share.clamp(max=1)).clamp(min=2) for share in (aspect, 1 / aspect))
    rows, columns = (
        resampling((K - length) / 2, length, upright, K, size, KERNELS["bicubic"]) for length in (height, width)
    )
    return along_both_axes(images_BCKK.float(), rows, columns).round_().clamp_(0, 255).to(torch.uint8)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """For evaluation: uint8 [B, C, H, W] to float32, standardised by channel and not augmented."""
    return _standardise(images / 255, mean, std)


def _standardise(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    mean_C11, std_C11 = torch.tensor([mean, std])[..., None, None].to(x.device, non_blocking=True)
    return (x - mean_C11) / std_C11


def draw_boxes(
    batch_size: int, height: int, width: int, scale: Sequence[float], aspects: Tensor | None = None
) -> Tensor:
    """Random resized crops as torchvision draws them.

    The area, relative to the image, is uniform in ``scale``, the aspect ratio log-uniform. The first of ten attempts
    that fits is taken; failing all ten, the largest centred box of a legal ratio. A box of an image that was squeezed
    from another aspect is squeezed alike: its area and its place are relative to the image, its ratio is divided by the
    image's.

    Args:
        batch_size: B.
        height, width: of the images.
        scale: the least and the largest area.
        aspects: [B] width / height that the images had before they were squeezed into squares; None: they were not.

    Returns:
        [B, 4] float32: top, left, height, width, in whole pixels.
    """
    attempts = (batch_size, CROP_ATTEMPTS)
    area = height * width * torch.empty(attempts).uniform_(*scale)
    aspect = (torch.ones(batch_size) if aspects is None else aspects)[:, None]
    ratio = torch.empty(attempts).uniform_(*map(math.log, CROP_RATIO)).exp() / aspect
    h, w = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (h > 0) & (h <= height) & (w > 0) & (w <= width)
    first = fits.int().argmax(1, keepdim=True)
    h, w, fits = h.gather(1, first), w.gather(1, first), fits.gather(1, first)
    top = (torch.rand(batch_size, 1) * (height - h + 1)).floor()
    left = (torch.rand(batch_size, 1) * (width - w + 1)).floor()

    centred_h = (width / (CROP_RATIO[0] / aspect)).round().clamp(1, height)
    centred_w = (height * (CROP_RATIO[1] / aspect)).round().clamp(1, width)
    centred = ((height - centred_h) / 2).floor(), ((width - centred_w) / 2).floor(), centred_h, centred_w
    return torch.where(fits, torch.cat([top, left, h, w], 1), torch.cat(centred, 1))


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution with a = -1/2, zero from 2 on."""
    x = x.abs().clamp(max=2)
    return torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2)


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


Kernel = Callable[[Tensor], Tensor]
KERNELS: dict[str, Kernel] = {"bicubic": _cubic, "bilinear": _triangle}


def resampling(start: Tensor, length: Tensor, flip: Tensor, N: int, S: int, kernel: Kernel) -> Tensor:
    """Crop, antialiased resize and flip along one axis, as a matrix for every image.

    The kernel widens as the crop shrinks. Taps outside the crop are dropped, and the rest made to sum to 1.

    Args:
        start: [B, 1] the crop's first pixel.
        length: [B, 1] the crop's length, in pixels.
        flip: [B, 1] 0 or 1.
        N: pixels of the image along this axis.
        S: pixels of the view along this axis.
        kernel: interpolation kernel of unit spacing.

    Returns:
        [B, S, N] float32, rows that sum to 1.
    """
    scale = length / S
    forward_S = torch.arange(S, device=start.device) + 0.5
    centre_BS = start + scale * torch.where(flip > 0, S - forward_S, forward_S)
    pixel_N = torch.arange(N, device=start.device) + 0.5
    inside_BN = (pixel_N > start) & (pixel_N < start + length)
    distance_BSN = (pixel_N - centre_BS[..., None]) / scale.clamp(min=1)[..., None]
    weights_BSN = kernel(distance_BSN) * inside_BN[:, None]
    return weights_BSN / weights_BSN.sum(2, keepdim=True)


def blurring(sigma: Tensor, S: int, radius: int) -> Tensor:
    """Gaussian blur along one axis, reflected at the borders, as a matrix for every image; the identity for sigma 0.

    Args:
        sigma: [B, 1] in pixels.
        S: pixels along this axis.
        radius: the kernel has 2 * radius + 1 taps, fewer in an image too small to reflect them.

    Returns:
        [B, S, S] float32, rows that sum to 1.
    """
    radius = min(radius, S - 1)
    offset_T = torch.arange(-radius, radius + 1, device=sigma.device)
    kernel_BT = (-0.5 * (offset_T / sigma.clamp(min=0.01)) ** 2).softmax(1)
    # A padded identity tells which input pixel j tap t of output pixel i reads.
    padded = F.pad(torch.eye(S, device=sigma.device)[None], (radius, radius), mode="reflect")[0]
    return torch.einsum("bt,jit->bij", kernel_BT, padded.unfold(1, 2 * radius + 1, 1))


def along_both_axes(x: Tensor, rows_BSH: Tensor, columns_BSW: Tensor) -> Tensor:
    """[B, C, H, W] to [B, C, S, S]: rows @ channel @ columns.T, every image with matrices of its own."""
    for matrix in (columns_BSW, rows_BSH):  # each turn transposes the image, two turns restore it
        x = (x.flatten(1, 2) @ matrix.mT).unflatten(1, x.shape[1:3]).mT
    return x


def luma(x: Tensor) -> Tensor:
    """Grey of ITU-R BT.601: [B, 3, S, S] to [B, 1, S, S]."""
    r, g, b = x.split(1, 1)
    return 0.2989 * r + 0.587 * g + 0.114 * b


def jitter_colours(x: Tensor, order: Tensor, factors: Tensor, hue: bool) -> Tensor:
    """Brightness, contrast, saturation and hue, in every image's own order.

    The hue, by far the costliest, is shifted once for the whole batch: first come the operations that precede it in
    their image's order, after it the others. An image with nothing to do at a turn is blended with factor 1.
    """
    operations = order.long()
    factor_in_turn = factors.gather(1, operations)
    hue_done = (operations == HUE).cumsum(1) > 0
    for turn in range(3):
        x = _blend(x, operations[:, turn], torch.where(hue_done[:, turn], 1, factor_in_turn[:, turn]))
    if hue:
        x = shift_hue(x, factors[:, HUE])
    for turn in range(1, 4):
        x = _blend(x, operations[:, turn], torch.where(hue_done[:, turn - 1], factor_in_turn[:, turn], 1))
    return x


def _blend(x: Tensor, operation: Tensor, factor: Tensor) -> Tensor:
    """Extrapolate from black (brightness), the image's mean grey (contrast) or each pixel's grey (saturation)."""
    operation, grey = _per_image(operation), luma(x)
    base = (operation == SATURATION) * grey + (operation == CONTRAST) * grey.mean((2, 3), keepdim=True)
    return torch.lerp(base, x, _per_image(factor)).clamp_(0, 1)


def shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Shift the hue of the HSV hexcone by ``turns`` [B]; images of shift 0 stay exactly as they are.

    Source: Smith 1978, "Color gamut transform pairs". Deviation: the way back is one piecewise linear function a
    channel, without the six cases.
    """
    r, g, b = x.split(1, 1)
    value = r.maximum(g).maximum(b)
    chroma = value - r.minimum(g).minimum(b)
    divisor = 6 * chroma.clamp(min=1e-12)  # grey has chroma 0, and its hue then makes no difference
    hue = torch.where(value == g, (b - r) / divisor + 1 / 3, (r - g) / divisor + 2 / 3)
    hue = torch.where(value == r, (g - b) / divisor, hue)
    # A channel is full within a sextant of its own hue, and gone from two sextants on.
    own_C11 = torch.arange(3, device=x.device)[:, None, None] / 3
    distance = hue + _per_image(turns) - own_C11
    distance = (distance - distance.round()).abs()
    shifted = value - chroma * (6 * distance - 1).clamp(0, 1)
    return torch.lerp(x, shifted, (_per_image(turns) != 0).float())


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
