"""``data.keep``: whole images are stored squeezed to squares, with their aspects; crops undo the squeezing."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from src import cli
from src.data import load
from src.data.augment import center_crop, draw_boxes
from src.data.cache import cached
from src.runs.record import Record
from tests.composing import composed
from tests.data.layouts import write_folder

SHAPES = [(16, 8), (8, 16), (12, 12), (24, 8)]


@pytest.fixture
def root(tmp_path):
    """Pictures of each shape in each class; one is stored sideways, with an EXIF tag that turns it upright."""
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i, shape in enumerate(SHAPES * 5):
            smooth(*shape, turn=i).save(tmp_path / "images" / name / f"{i:02}.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth(16, 8).save(tmp_path / "images/a/00.png", exif=exif)
    return tmp_path / "images"


def smooth(width: int, height: int, turn: float = 0.0) -> Image.Image:
    """A picture that changes little from pixel to pixel, differently in each channel."""
    y, x = np.mgrid[:height, :width] / 8
    waves = [np.sin(x + y + turn), np.sin(2 * x - y), np.cos(x - turn)]
    return Image.fromarray(np.uint8(127.5 + 100 * np.stack(waves, 2)))


def test_the_cache_has_whole_images_and_their_aspects(config, root):
    cfg = config("image_folder", root, keep=10)
    dataset = load(dataclasses.replace(cfg, final=True))
    shapes = [np.float32(w / h) for w, h in [*SHAPES * 5, *SHAPES * 5]]
    shapes[0] = np.float32(8 / 16)  # the picture that is turned upright
    everything = torch.cat([dataset.train.aspects, dataset.test.aspects])
    assert sorted(everything.tolist()) == sorted(map(float, shapes))
    wanted = [ImageOps.exif_transpose(Image.open(path)) for path in sorted(root.rglob("*.png"))]
    wanted = {np.asarray(each.resize((10, 10), Image.Resampling.BICUBIC)).tobytes(): each for each in wanted}
    for images, aspects in ((split.images, split.aspects) for split in (dataset.train, dataset.test)):
        for image, aspect in zip(images, aspects, strict=True):
            picture = wanted[image.permute(1, 2, 0).contiguous().numpy().tobytes()]
            assert picture.width / picture.height == pytest.approx(float(aspect))
    train = dataset.train
    assert torch.equal(train.squares("cpu"), center_crop(train.images, train.aspects, 8))


def test_other_aspects_of_the_same_pixels_are_other_images(config, tmp_path):
    def constant(width: int):
        root = write_folder(tmp_path / str(width), {"a": 5, "b": 5})
        for i, path in enumerate(sorted(root.rglob("*.png"))):
            Image.new("RGB", (width, 8), (i, i, i)).save(path)
        return root

    one, other = (config("image_folder", constant(width), keep=8) for width in (8, 16))
    assert cached(one).fingerprint != cached(other).fingerprint
    whole, square = (dataclasses.replace(other, keep=keep, resize="squash") for keep in (8, None))
    assert cached(whole).fingerprint != cached(square).fingerprint


@pytest.mark.parametrize("size", [(96, 64), (64, 96), (64, 64), (150, 64)])
def test_the_middle_is_that_of_resize_and_center_crop(size):
    picture, K, S = smooth(*size), 64, 56
    squeezed = torch.from_numpy(np.array(picture.resize((K, K), Image.Resampling.BICUBIC))).permute(2, 0, 1)[None]
    got = center_crop(squeezed, torch.tensor([picture.width / picture.height]), S)[0].permute(1, 2, 0).int()
    left, top = (picture.width - S) // 2, (picture.height - S) // 2
    wanted = torch.from_numpy(np.array(picture.crop((left, top, left + S, top + S)))).int()
    inner = slice(2, -2)  # at the edge a crop sees no neighbours
    assert (got - wanted)[inner, inner].abs().max() <= (0 if size[0] == size[1] else 4)


def test_the_middle_of_a_panorama_is_finite():
    flat = torch.full((4, 3, 16, 16), 200, dtype=torch.uint8)
    assert torch.equal(center_crop(flat, torch.tensor([1e-4, 1e4, 60.0, 1 / 60]), 14), flat[..., :14, :14])


@pytest.mark.parametrize(("width", "height"), [(400, 200), (200, 300)])
def test_crops_are_those_of_the_whole_image(width, height):
    """In the proportions of the original image, boxes are distributed as torchvision's on that image."""
    torch.manual_seed(0)
    aspects = torch.full((3000,), width / height)
    boxes = draw_boxes(3000, 200, 200, [0.08, 1.0], aspects).double() * torch.tensor([height, width] * 2) / 200
    image = torch.empty(3, height, width)
    theirs = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(1500)]
    for ours, other in zip(boxes.T, torch.tensor(theirs).double().T, strict=True):
        assert stats.ks_2samp(ours, other).pvalue > 0.01


def test_a_crop_that_never_fits_is_the_middle_of_the_whole_image():
    box = draw_boxes(2, 30, 30, [4.0, 4.0], torch.full((2,), 3.0))[0] * torch.tensor([1, 3, 1, 3])
    wanted = RandomResizedCrop.get_params(torch.empty(3, 30, 90), [4.0, 4.0], [3 / 4, 4 / 3])
    assert (box - torch.tensor(wanted)).abs().max() <= 3  # 3 pixels wide is one stored pixel


def test_a_run_on_whole_images_is_trained_and_evaluated(small, tmp_path, root):
    kept = ["data=image_folder", f"data.root={root}", "data.limit=null", "data.image_size=8", "data.keep=12"]
    fewer = ["batch_size=8", "k=2", "epochs=1", "tracking=jsonl"]
    cli.pretrain(composed(*small, *kept, *fewer, f"output_dir={tmp_path}/run"))
    assert {"val/knn_top1", "test/linear_top1"} <= Record.load(tmp_path / "run").metrics.keys()
