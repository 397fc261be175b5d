"""An image of any mode, size and format becomes one of the chosen size."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from src.data.decoding import FORMATS, SUFFIXES, LazyImage, open_bytes
from src.errors import UsageError
from tests.data.layouts import SIZE, decoded, encoded, pixels, random_image


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1"])
def test_any_mode_becomes_the_rgb_of_pillow(mode):
    image = random_image(0).convert(mode)
    got = decoded(LazyImage("x", lambda: image.copy()), SIZE)
    assert np.array_equal(got, pixels([image])[0])


@pytest.mark.parametrize("square", [13, 8, 5])
def test_a_square_is_resized_as_torchvision_does(square):
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize

    image = random_image(1, square, square)
    want = resize(image, [SIZE, SIZE], InterpolationMode.BICUBIC, antialias=True)
    assert np.array_equal(decoded(LazyImage("x", lambda: image), SIZE), pixels([want])[0])


@pytest.mark.parametrize(("width", "height"), [(24, 8), (8, 24)])
def test_a_long_image_keeps_its_middle(width, height):
    image = random_image(2, width, height)
    left, top = (width - SIZE) // 2, (height - SIZE) // 2
    want = image.crop((left, top, left + SIZE, top + SIZE))
    assert np.array_equal(decoded(LazyImage("x", lambda: image), SIZE), pixels([want])[0])


def test_a_long_image_is_shrunk_to_its_shorter_side_as_torchvision_does():
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import center_crop, resize

    smooth = random_image(3, 6, 4).resize((96, 64), Image.Resampling.BICUBIC)
    want = center_crop(resize(smooth, 16, InterpolationMode.BICUBIC, antialias=True), [16, 16])
    difference = decoded(LazyImage("x", lambda: smooth), 16).astype(int) - pixels([want])[0]
    assert np.abs(difference).max() <= 4  # the window keeps fractions of a pixel where torchvision rounds


def test_a_photo_stored_sideways_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    stored = random_image(4)
    stored.save(tmp_path / "photo.png", exif=exif)
    got = decoded(LazyImage("x", lambda: Image.open(tmp_path / "photo.png")), SIZE)
    assert np.array_equal(got, np.rot90(pixels([stored])[0], k=-1, axes=(1, 2)))


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_of_several_frames_none_is_picked(kind):
    frames = [random_image(i) for i in range(2)]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(UsageError, match="x: has several frames; keep the one that is meant"):
        decoded(LazyImage("x", lambda: open_bytes(content)), SIZE)


def test_a_photo_with_a_preview_beside_it_is_one_image():
    content = encoded(random_image(0, 64, 64), "mpo", save_all=True, append_images=[random_image(1)])
    assert decoded(LazyImage("x", lambda: open_bytes(content)), SIZE).shape == (3, SIZE, SIZE)


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (10_000, 10_000)])  # Pillow refuses, and warns
def test_a_decompression_bomb_is_refused_before_it_goes_off(width, height):
    content = encoded(Image.new("1", (width, height)))
    assert len(content) < 100_000
    with pytest.raises(UsageError, match=r"x: .*89,478,485"):
        decoded(LazyImage("x", lambda: open_bytes(content)), SIZE)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (20_000, 1), (1, 20_000)])
def test_any_other_size_will_do(width, height):
    content = encoded(Image.new("RGB", (width, height), (10, 20, 30)))
    got = decoded(LazyImage("x", lambda: open_bytes(content)), SIZE)
    assert got.reshape(3, -1).tolist() == [[value] * SIZE**2 for value in (10, 20, 30)]


def test_suffixes_are_those_of_the_formats_that_are_read():
    Image.init()
    assert sorted(SUFFIXES) == sorted(key for key, kind in Image.registered_extensions().items() if kind in FORMATS)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize(("background", "behind"), [("white", 255), ("grey", 128), ("black", 0), (None, 7)])
def test_what_is_transparent_shows_the_background(mode, background, behind):
    image = Image.new("RGBA", (SIZE, SIZE), (7, 7, 7, 0))  # the picture is in the alpha channel alone
    image.paste((7, 7, 7, 255), (0, 0, SIZE // 2, SIZE))
    image = image.quantize(2) if mode == "P" else image.convert(mode)
    got = decoded(LazyImage("x", lambda: open_bytes(encoded(image))), SIZE, "crop", background)
    assert (got[:, :, : SIZE // 2] == 7).all()
    assert (got[:, :, SIZE // 2 :] == behind).all()


def test_half_transparent_is_half_the_background():
    image = Image.new("RGBA", (SIZE, SIZE), (100, 100, 100, 51))
    got = decoded(LazyImage("x", lambda: image), SIZE, "crop", "white")
    assert (got == round(0.2 * 100 + 0.8 * 255)).all()


def test_squash_keeps_all_of_a_wide_image():
    image = random_image(1, 64, 16)
    want = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    assert np.array_equal(decoded(LazyImage("x", lambda: image), SIZE, "squash"), pixels([want])[0])


@pytest.mark.parametrize(("background", "bar"), [("white", 255), (None, 0)])
def test_pad_keeps_all_of_a_wide_image_and_its_aspect(background, bar):
    image = random_image(1, 32, 16)
    got = decoded(LazyImage("x", lambda: image), SIZE, "pad", background)
    want = image.resize((SIZE, SIZE // 2), Image.Resampling.BICUBIC)
    quarter = SIZE // 4
    assert np.array_equal(got[:, quarter:-quarter], pixels([want])[0])
    assert (got[:, :quarter] == bar).all()
    assert (got[:, -quarter:] == bar).all()


@pytest.mark.parametrize(("size", "part"), [(SIZE, 8), (16, 8), (17, 4), (32, 4), (33, 2), (65, 2), (66, 1)])
def test_a_draft_is_decoded_at_the_smallest_part_of_twice_the_size(size, part):
    photo = random_image(5, 3, 2).resize((340, 260), Image.Resampling.BICUBIC)
    content, opened = encoded(photo, "jpeg"), []

    def noting() -> Image.Image:
        opened.append(open_bytes(content))
        return opened[0]

    got = decoded(LazyImage("x", noting), size, draft=True)
    with open_bytes(content) as image:
        image.draft("RGB", (340 // part, 260 // part))
        assert image.width == -(-340 // part)
        want = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    assert opened[0].size == (-(-340 // part), -(-260 // part))
    assert np.array_equal(got, pixels([want])[0])
    whole = decoded(LazyImage("x", lambda: open_bytes(content)), size)
    assert np.abs(got.astype(int) - whole).mean() < 4
    assert np.array_equal(got, whole) == (part == 1)


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_a_draft_of_another_format_is_the_image(kind):
    content = encoded(random_image(6, 64, 64), kind)
    got = decoded(LazyImage("x", lambda: open_bytes(content)), SIZE, draft=True)
    assert np.array_equal(got, decoded(LazyImage("x", lambda: open_bytes(content)), SIZE))


def test_postscript_is_not_handed_to_an_interpreter(monkeypatch):
    def run(*args, **kwargs):
        pytest.fail("a program was started")

    monkeypatch.setattr("subprocess.check_call", run)
    content = encoded(random_image(0), "eps")
    with pytest.raises(UsageError, match="not an image"):
        decoded(LazyImage("x.png", lambda: open_bytes(content)), SIZE)


def test_more_than_8_bits_are_refused_rather_than_clipped():
    image = Image.fromarray(np.full((SIZE, SIZE), 40_000, np.uint16))
    with pytest.raises(UsageError, match=r"scan\.png: pixels of 16 or 32 bits"):
        decoded(LazyImage("scan.png", lambda: image), SIZE)
