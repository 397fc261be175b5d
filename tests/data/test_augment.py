"""Views equal torchvision's, applied image by image: each operation, the whole chain, and the distribution of draws."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from scipy import stats
from torch.testing import assert_close
from torchvision.transforms import ColorJitter, InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as TF

from src.build import COMPILE_MODE
from src.config.schema import Augment, View
from src.data.augment import (
    KERNELS,
    Params,
    ViewMaker,
    along_both_axes,
    blurring,
    draw_boxes,
    jitter_colours,
    luma,
    normalise,
    resampling,
    shift_hue,
)
from src.system.environment import CONF

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
ADJUST = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
EVERYTHING = View(
    crop_scale=[0.08, 1.0],
    flip=0.5,
    jitter=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    grey=0.2,
    blur=0.5,
    blur_sigma=[0.1, 2.0],
    solarize=0.2,
)
NOTHING = replace(EVERYTHING, flip=0.0, jitter=0.0, grey=0.0, blur=0.0, solarize=0.0)


def maker(view=EVERYTHING, size=32, interpolation="bicubic", compile_mode=None):
    return ViewMaker(view, interpolation, size, MEAN, STD, compile_mode=compile_mode)


def images(count, height=32, width=32):
    """Noise and flat patches: 8-bit images whose hues, greys and borders all occur."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)
    noise[:, :, : height // 3] = noise[:, :, :1, :1]
    noise[:, :, height // 3 : height // 2] = noise[:, :1, height // 3 : height // 2]
    return noise


def test_the_parts_of_a_batch_have_the_views_of_the_whole():
    def view(number, parts):
        torch.manual_seed(5)
        made = ViewMaker(EVERYTHING, "bicubic", 32, MEAN, STD, part=(number, parts))(images(6).chunk(parts)[number])
        return made, torch.rand(1)  # the next view's draws must be the same too

    whole, then = view(0, 1)
    parts, thens = zip(*(view(number, 3) for number in range(3)), strict=True)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-6)
    assert all(each == then for each in thens)


def by_torchvision(image, params, row, size, mode, radius):
    """The view that torchvision makes of one uint8 image [3, H, W] with the draws of that row."""
    top, left, height, width = params.box[row].int().tolist()
    x = TF.resized_crop(image / 255, top, left, height, width, [size, size], InterpolationMode(mode), antialias=True)
    x = x.clamp(0, 1)
    if params.flip[row]:
        x = TF.hflip(x)
    for operation in params.order[row].int().tolist():
        x = ADJUST[operation](x, params.factors[row, operation].item())
    if params.grey[row]:
        x = TF.rgb_to_grayscale(x, 3)
    if params.sigma[row]:
        x = TF.gaussian_blur(x, 2 * radius + 1, params.sigma[row].item())
    if params.solarize[row]:
        x = TF.solarize(x, 0.5)
    return TF.normalize(x, MEAN, STD)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("height", "width", "size"), [(32, 32, 32), (48, 20, 32), (20, 48, 32), (96, 130, 24), (9, 12, 40), (32, 32, 5)]
)
def test_the_chain_equals_torchvision(mode, height, width, size):
    torch.manual_seed(0)
    make, batch = maker(size=size, interpolation=mode), images(48, height, width)
    params = make.draw(len(batch), height, width, "cpu")
    # At solarization's threshold the last bit decides, so it is left out here and has a test of its own.
    params = params._replace(solarize=torch.zeros_like(params.solarize))
    expected = [by_torchvision(x, params, row, size, mode, min(6, size - 1)) for row, x in enumerate(batch)]
    # torchvision computes hue on a 24-bit hexcone of its own. Before the division by the std, 1e-4 is 1/40 of an 8-bit
    # level.
    assert_close(make.apply(batch, params), torch.stack(expected), atol=1e-4 / min(STD), rtol=0)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_crop_resize_flip_equal_torchvision_before_the_clamp(mode, flip):
    x = images(4, 30, 50) / 255
    boxes = torch.tensor([[0, 0, 30, 50], [3, 7, 1, 1], [10, 20, 20, 30], [29, 0, 1, 50]]).float()
    top, left, height, width = boxes.split(1, 1)
    flips = torch.full_like(top, flip)
    rows = resampling(top, height, torch.zeros_like(top), 30, 16, KERNELS[mode])
    columns = resampling(left, width, flips, 50, 16, KERNELS[mode])
    for row, (image, box) in enumerate(zip(x, boxes.int().tolist(), strict=True)):
        expected = TF.resized_crop(image, *box, [16, 16], InterpolationMode(mode), antialias=True)
        expected = TF.hflip(expected) if flip else expected
        assert_close(along_both_axes(x, rows, columns)[row], expected, atol=2e-6, rtol=0)


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(sorted(KERNELS)), st.data())
@settings(max_examples=60)
def test_resampling_keeps_constants_and_never_looks_outside_the_crop(pixels, size, mode, data):
    start = data.draw(st.integers(0, pixels - 1))
    length = data.draw(st.integers(1, pixels - start))
    matrix = resampling(*torch.tensor([[[start]], [[length]], [[0]]]).float(), pixels, size, KERNELS[mode])[0]
    assert_close(matrix.sum(1), torch.ones(size))
    outside = torch.ones(pixels, dtype=torch.bool)
    outside[start : start + length] = False
    assert not matrix[:, outside].any()
    flipped = resampling(*torch.tensor([[[start]], [[length]], [[1]]]).float(), pixels, size, KERNELS[mode])[0]
    assert_close(flipped, matrix.flip(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("operation", range(4))
def test_each_colour_operation_equals_torchvision(operation):
    x = images(6) / 255
    choices = [-0.5, -0.1, 0.0, 0.01, 0.3, 0.5] if operation == 3 else [0.0, 0.3, 0.9, 1.0, 1.1, 1.9]
    factors = torch.tensor([[1.0, 1.0, 1.0, 0.0]]).repeat(6, 1)
    factors[:, operation] = torch.tensor(choices)
    got = jitter_colours(x, torch.arange(4.0).repeat(6, 1), factors, hue=True)
    expected = torch.stack([ADJUST[operation](image, factor) for image, factor in zip(x, choices, strict=True)])
    assert_close(got, expected, atol=1e-5, rtol=0)


def test_colour_operations_happen_in_the_order_drawn():
    orders = torch.tensor([list(order) for order in permutations(range(4))])
    x = (images(1) / 255).repeat(24, 1, 1, 1)
    factors = torch.tensor([1.4, 0.5, 1.8, 0.2])
    expected = []
    for order in orders.tolist():
        image = x[0]
        for operation in order:
            image = ADJUST[operation](image, factors[operation].item())
        expected.append(image)
    assert_close(
        jitter_colours(x, orders.float(), factors.repeat(24, 1), hue=True), torch.stack(expected), atol=2e-5, rtol=0
    )
    assert len({image.sum().item() for image in expected}) > 12  # the order matters, so the test can fail


def test_grey_images_have_no_hue_to_shift():
    grey = torch.rand(3, 1, 8, 8).expand(3, 3, 8, 8)
    assert torch.equal(shift_hue(grey, torch.tensor([0.3, -0.5, 0.0])), grey)


def test_luma_equals_torchvision():
    x = images(3) / 255
    assert_close(luma(x), TF.rgb_to_grayscale(x))


@pytest.mark.parametrize("size", [2, 5, 32])
def test_blur_equals_torchvision(size):
    sigmas = [0.1, 0.7, 2.0]
    x = images(3, size, size) / 255
    matrices = blurring(torch.tensor(sigmas)[:, None], size, radius=6)
    radius = min(6, size - 1)
    expected = [TF.gaussian_blur(image, 2 * radius + 1, sigma) for image, sigma in zip(x, sigmas, strict=True)]
    assert_close(along_both_axes(x, matrices, matrices), torch.stack(expected), atol=2e-6, rtol=0)


def test_solarize_equals_torchvision_at_every_level():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    make = maker(replace(NOTHING, crop_scale=[1.0, 1.0], solarize=1.0), size=16)
    whole = make.draw(1, 16, 16, "cpu")._replace(box=torch.tensor([[0.0, 0.0, 16.0, 16.0]]))
    expected = TF.normalize(TF.solarize(levels / 255, 0.5), MEAN, STD)
    assert_close(make.apply(levels, whole), expected, atol=1e-5, rtol=0)


def test_normalise_equals_torchvision():
    batch = images(3)
    assert_close(normalise(batch, MEAN, STD), TF.normalize(batch / 255, MEAN, STD))


def test_a_view_without_its_random_operations_is_the_normalised_image():
    batch, make = images(4), maker(NOTHING)
    whole = make.draw(4, 32, 32, "cpu")._replace(box=torch.tensor([[0.0, 0.0, 32.0, 32.0]]).repeat(4, 1))
    assert_close(make.apply(batch, whole), normalise(batch, MEAN, STD), atol=1e-5, rtol=0)


def test_spared_images_pass_bit_for_bit_through_operations_that_others_need():
    batch, make = images(8), maker()
    spared = maker(NOTHING).draw(8, 32, 32, "cpu")
    assert torch.equal(make.apply(batch, spared), maker(NOTHING).apply(batch, spared))


def test_images_do_not_see_each_other():
    batch, make = images(16), maker()
    params = make.draw(16, 32, 32, "cpu")
    before = make.apply(batch, params)
    batch[5] = 255 - batch[5]
    after = make.apply(batch, params)
    same = (before == after).flatten(1).all(1)
    assert same.tolist() == [row != 5 for row in range(16)]


def test_views_follow_the_default_generator_and_leave_the_images_alone():
    batch, make = images(16), maker()
    original = batch.clone()
    torch.manual_seed(7)
    first, second = make(batch), make(batch)
    torch.manual_seed(7)
    assert torch.equal(make(batch), first)
    assert not torch.equal(first, second)
    assert torch.equal(batch, original)
    assert first.dtype == torch.float32
    assert first.shape == (16, 3, 32, 32)


def test_autocast_does_not_reach_the_views():
    batch, make = images(4), maker()
    params = make.draw(4, 32, 32, "cpu")
    expected = make.apply(batch, params)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(make.apply(batch, params), expected)


def box_statistics(boxes):
    top, left, height, width = boxes.double().T
    return {"top": top, "left": left, "area": height * width, "ratio": width / height}


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(32, 32, [0.08, 1.0]), (40, 90, [0.5, 1.0]), (96, 20, [0.2, 1.0])]
)
def test_crops_are_distributed_as_torchvisions(height, width, scale):
    torch.manual_seed(0)
    ours = box_statistics(draw_boxes(4000, height, width, scale))
    image = torch.empty(3, height, width)
    theirs = [RandomResizedCrop.get_params(image, scale, [3 / 4, 4 / 3]) for _ in range(2000)]
    theirs = box_statistics(torch.tensor(theirs))
    for name in ours:
        assert stats.ks_2samp(ours[name], theirs[name]).pvalue > 0.01, name


@pytest.mark.parametrize(("height", "width"), [(10, 100), (100, 10), (33, 33)])
def test_a_crop_that_never_fits_falls_back_to_torchvisions_centre(height, width):
    too_large = [4.0, 4.0]
    expected = RandomResizedCrop.get_params(torch.empty(3, height, width), too_large, [3 / 4, 4 / 3])
    assert draw_boxes(3, height, width, too_large).int().tolist() == [list(expected)] * 3


def test_colour_factors_are_distributed_as_torchvisions():
    torch.manual_seed(0)
    view = replace(EVERYTHING, jitter=1.0, brightness=1.5)  # factors from max(0, 1 - 1.5) to 2.5
    params = maker(view).draw(4000, 32, 32, "cpu")
    reference = ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    ranges = reference.brightness, reference.contrast, reference.saturation, reference.hue
    theirs = torch.tensor([ColorJitter.get_params(*ranges)[1:] for _ in range(2000)])
    for operation in range(4):
        assert stats.ks_2samp(params.factors[:, operation], theirs[:, operation]).pvalue > 0.01


def test_orders_are_uniform_over_the_24_permutations():
    torch.manual_seed(0)
    orders = maker().draw(12000, 32, 32, "cpu").order
    _, counts = orders.unique(dim=0, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 0.01


def test_operations_are_chosen_with_their_probabilities_and_independently():
    torch.manual_seed(0)
    params = maker().draw(8000, 32, 32, "cpu")
    chosen = {
        "flip": params.flip,
        "jitter": (params.factors != torch.tensor([1.0, 1.0, 1.0, 0.0])).any(1),
        "grey": params.grey,
        "blur": params.sigma > 0,
        "solarize": params.solarize,
    }
    for name, flags in chosen.items():
        assert stats.binomtest(int(flags.sum()), 8000, getattr(EVERYTHING, name)).pvalue > 0.01, name
    correlations = torch.corrcoef(torch.stack([flags.flatten().float() for flags in chosen.values()]))
    assert (correlations - torch.eye(5)).abs().max() < 4 / 8000**0.5
    sigmas = params.sigma[params.sigma > 0]
    assert stats.kstest(sigmas, "uniform", args=(0.1, 1.9)).pvalue > 0.01


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_probabilities_0_and_1_are_certainties(probability):
    p = probability
    params = maker(replace(EVERYTHING, flip=p, jitter=p, grey=p, blur=p, solarize=p)).draw(500, 32, 32, "cpu")
    neutral = torch.tensor([1.0, 1.0, 1.0, 0.0])
    for flags in (
        params.flip,
        params.factors != neutral,
        params.grey,
        params.sigma > 0,
        params.solarize,
    ):
        assert flags.bool().all() if p else not flags.any()


def test_the_draws_of_a_batch_are_one_row_an_image():
    for tensor in maker().draw(7, 20, 30, "cpu"):
        assert tensor.shape[0] == 7
        assert tensor.dtype == torch.float32


@pytest.mark.parametrize("path", sorted((CONF / "augment").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_has_exactly_the_fields_of_the_schema_and_makes_views(path):
    loaded = OmegaConf.load(path)
    recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Augment), loaded))
    assert recipe.name == path.stem
    assert set(loaded.view1) == set(loaded.view2) == set(EVERYTHING.__dict__)
    loaded.view1.blur = 0.75  # an override of one view leaves the other alone
    assert loaded.view2.blur == recipe.view2.blur
    for view in (recipe.view1, recipe.view2):
        assert torch.isfinite(maker(view, interpolation=recipe.interpolation)(images(4))).all()


@pytest.mark.slow
def test_compiled_views_equal_eager_ones():
    batch, views = images(16), []
    for mode in (None, COMPILE_MODE):
        torch.manual_seed(3)
        views.append(maker(compile_mode=mode)(batch))
    assert_close(*views, atol=1e-4, rtol=0)


@pytest.mark.gpu
def test_views_are_the_same_on_a_gpu_which_the_host_never_waits_for():
    batch, make = images(64), maker()
    torch.manual_seed(3)
    expected = make(batch)
    batch = batch.cuda()
    make(batch)
    torch.manual_seed(3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = make(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    differs = (got.cpu() - expected).abs() > 1e-4 / min(STD)
    assert differs.float().mean() < 1e-3  # at solarization's threshold the last bit decides
    assert isinstance(make.draw(2, 32, 32, "cuda"), Params)
