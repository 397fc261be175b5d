"""Augmented views, computed for a whole batch at once on its device; each image has its own random draws.

Source: the operations of SimCLR (Chen et al. 2020, appendix A) and BYOL's solarization (Grill et al. 2020, appendix B),
each as torchvision computes it on float images. Deviation from torchvision on 8-bit images: nothing is rounded between
operations. The crop is clamped to [0, 1], because a bicubic resize overshoots.

Shape suffixes: B images, C = 3 channels, H and W an image's height and width, S the side of a view, N an image's pixels
along one axis, T taps of the blur, K the side of a whole image that is stored as a square.
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
    """All random draws for one view of a batch, float32. An image that skips an operation has its neutral value."""

    box: Tensor  # [B, 4] the crop: top, left, height, width, in whole pixels
    flip: Tensor  # [B, 1] 0 or 1
    order: Tensor  # [B, 4] a permutation of 0, 1, 2, 3: the order of the four colour-jitter operations
    factors: Tensor  # [B, 4] of brightness, contrast and saturation (neutral 1), and the hue shift in turns (neutral 0)
    grey: Tensor  # [B, 1] 0 or 1
    sigma: Tensor  # [B, 1] standard deviation of the Gaussian blur, in pixels (neutral 0)
    solarize: Tensor  # [B, 1] 0 or 1


class ViewMaker:
    """Makes one view of every image of a batch.

    Args:
        view: probabilities and strengths of the operations. An operation with probability 0 costs nothing.
        interpolation: ``bicubic`` or ``bilinear``, both antialiased.
        image_size: S, in pixels.
        mean: the mean of each channel over the data set, for pixels in [0, 1].
        std: the standard deviation of each channel over the data set, for pixels in [0, 1].
        part: (index, number of equal parts): which part of the whole batch the images are. Draws are always made for
            the whole batch, so that a rank's images get the draws that they would get on a single device.
        compile_mode: the mode in which torch.compile fuses the arithmetic; None: eager. The draws are not compiled.
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
        """Draw one view's parameters from torch's default CPU generator, so that views do not depend on the device."""
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
        # All draws travel in one copy, for which the host does not wait.
        own = torch.cat([p.float() for p in params], 1).chunk(parts)[number]
        packed = own.to(device, non_blocking=True)
        return Params(*packed.split([p.shape[1] for p in params], 1))

    def apply(self, images_BCHW: Tensor, params: Params) -> Tensor:
        """Compute the views that the draws describe: a pure function of uint8 images and draws on the same device.

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
        """Draw the parameters of a view and apply them: [B, C, H, W] uint8 to [B, C, S, S] float32, normalised.

        Args:
            images_BCHW: the images.
            aspects: [size of the whole batch] on the CPU: the width / height of each image before it was squeezed into
                a square; None: the images have not been squeezed.
        """
        B, _, H, W = images_BCHW.shape
        return self._apply(images_BCHW, self.draw(B, H, W, images_BCHW.device, aspects))


def center_crop(images_BCKK: Tensor, aspects: Tensor, size: int) -> Tensor:
    """Cut the central square out of images that have been squeezed into squares, with their original aspect restored.

    The result is what torchvision's Resize(K) and CenterCrop(S) give: the shorter side has K pixels, of which the
    middle S are kept.

    Args:
        images_BCKK: uint8 squares.
        aspects: [B] width / height of each image before it was squeezed.
        size: S, in pixels.

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
    """Standardise uint8 images [B, C, H, W] by channel without augmentation, for evaluation; returns float32."""
    return _standardise(images / 255, mean, std)


def _standardise(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    mean_C11, std_C11 = torch.tensor([mean, std])[..., None, None].to(x.device, non_blocking=True)
    return (x - mean_C11) / std_C11


def draw_boxes(
    batch_size: int, height: int, width: int, scale: Sequence[float], aspects: Tensor | None = None
) -> Tensor:
    """Draw random resized crops as torchvision does.

    The area, relative to the image, is uniform in ``scale``, and the aspect ratio is log-uniform. The first of ten
    attempts that fits into the image is taken; if none fits, the largest centred box with an allowed ratio is. A crop
    of an image that was squeezed into a square is squeezed like it: the crop's aspect ratio is divided by the image's,
    while its area and position, which are relative to the image, stay the same.

    Args:
        batch_size: B.
        height, width: of the images, in pixels.
        scale: the smallest and the largest area, relative to the image.
        aspects: [B] width / height of the images before they were squeezed into squares; None: they were not.

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
    """Keys' cubic convolution kernel with a = -1/2, which is zero for distances of 2 and more."""
    x = x.abs().clamp(max=2)
    return torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2)


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


Kernel = Callable[[Tensor], Tensor]
KERNELS: dict[str, Kernel] = {"bicubic": _cubic, "bilinear": _triangle}


def resampling(start: Tensor, length: Tensor, flip: Tensor, N: int, S: int, kernel: Kernel) -> Tensor:
    """Build the matrix, one for each image, that crops, resizes with antialiasing and flips along one axis.

    When the crop has more pixels than the view, the kernel is widened by that factor. Taps outside the crop are
    dropped, and the remaining ones are scaled to sum to 1.

    Args:
        start: [B, 1] the crop's first pixel.
        length: [B, 1] the crop's length, in pixels.
        flip: [B, 1] 0 or 1.
        N: pixels of the image along this axis.
        S: pixels of the view along this axis.
        kernel: interpolation kernel, a function of the distance in pixels.

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
    """Build the matrix, one for each image, of a Gaussian blur along one axis; for sigma 0 it is the identity.

    The image is reflected at its borders.

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
    # The unfolded, padded identity is 1 at [j, i, t] where tap t of output pixel i reads input pixel j.
    padded = F.pad(torch.eye(S, device=sigma.device)[None], (radius, radius), mode="reflect")[0]
    return torch.einsum("bt,jit->bij", kernel_BT, padded.unfold(1, 2 * radius + 1, 1))


def along_both_axes(x: Tensor, rows_BSH: Tensor, columns_BSW: Tensor) -> Tensor:
    """Map [B, C, H, W] to [B, C, S, S] by rows @ channel @ columns.T, with separate matrices for each image."""
    for matrix in (columns_BSW, rows_BSH):  # each pass transposes the image, so two passes restore its orientation
        x = (x.flatten(1, 2) @ matrix.mT).unflatten(1, x.shape[1:3]).mT
    return x


def luma(x: Tensor) -> Tensor:
    """Convert RGB to grey by ITU-R BT.601: [B, 3, S, S] to [B, 1, S, S]."""
    r, g, b = x.split(1, 1)
    return 0.2989 * r + 0.587 * g + 0.114 * b


def jitter_colours(x: Tensor, order: Tensor, factors: Tensor, hue: bool) -> Tensor:
    """Adjust brightness, contrast, saturation and hue, in a separate order for each image.

    The hue shift is by far the most expensive operation, so it runs once for the whole batch: before it the operations
    that precede it in an image's order, and after it the others. A factor of 1 leaves an image unchanged in a round in
    which it has no operation.
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
    """Interpolate between x and black (brightness), the mean grey (contrast) or each pixel's grey (saturation).

    The factor is the weight of x; above 1 it extrapolates.
    """
    operation, grey = _per_image(operation), luma(x)
    base = (operation == SATURATION) * grey + (operation == CONTRAST) * grey.mean((2, 3), keepdim=True)
    return torch.lerp(base, x, _per_image(factor)).clamp_(0, 1)


def shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Shift the hue in the HSV hexcone model by ``turns`` [B] full turns; an image with shift 0 stays exactly the same.

    Source: Smith 1978, "Color gamut transform pairs". Deviation: the conversion back to RGB is one piecewise linear
    function for each channel instead of a distinction of six cases.
    """
    r, g, b = x.split(1, 1)
    value = r.maximum(g).maximum(b)
    chroma = value - r.minimum(g).minimum(b)
    divisor = 6 * chroma.clamp(min=1e-12)  # a grey pixel has chroma 0, so its hue makes no difference
    hue = torch.where(value == g, (b - r) / divisor + 1 / 3, (r - g) / divisor + 2 / 3)
    hue = torch.where(value == r, (g - b) / divisor, hue)
    # A channel is at its maximum up to one sextant from its own hue, and at its minimum from two sextants on.
    own_C11 = torch.arange(3, device=x.device)[:, None, None] / 3
    distance = hue + _per_image(turns) - own_C11
    distance = (distance - distance.round()).abs()
    shifted = value - chroma * (6 * distance - 1).clamp(0, 1)
    return torch.lerp(x, shifted, (_per_image(turns) != 0).float())


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
