import io
import os

import numpy as np
import pytest
from PIL import Image

from image_folders import make_folder
from statickey.data import load_images, open_image, open_stream, to_mode
from statickey.data.module import ImageDataModule
from statickey.data.pixels import LARGEST_SIDE, check_side, square
from statickey.errors import DataError

DEEP = {
    "16 bit": (np.uint16, "PNG", [0, 257, 30000, 65535], [0, 1, 117, 255]),
    "16 bit, dark": (np.uint16, "TIFF", [0, 100, 200, 250], [0, 0, 1, 1]),
    "32 bit of 8": (np.int32, "TIFF", [0, 1, 100, 255], [0, 1, 100, 255]),
    "32 bit of 16": (np.int32, "TIFF", [0, 257, 30000, 65535], [0, 1, 117, 255]),
    "PGM of 16": (np.uint16, "PPM", [0, 100, 200, 250], [0, 0, 1, 1]),
    "float of 1": (np.float32, "TIFF", [0.0, 0.1, 0.5, 1.0], [0, 26, 128, 255]),
    "float of 255": (np.float32, "TIFF", [0.0, 1.0, 99.6, 255.0], [0, 1, 100, 255]),
    "float of 65535": (np.float32, "TIFF", [0.0, 257.0, 30000.0, 65535.0], [0, 1, 117, 255]),
}


def stored(array, kind):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return Image.open(file)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("case", DEEP)
def test_deep_images_come_in_the_range_of_their_type(case, mode):
    dtype, kind, values, expected = DEEP[case]
    image = to_mode(stored(np.array([values], dtype), kind), mode)
    assert image.mode == mode
    pixels = np.asarray(image).reshape(1, 4, -1)
    assert (pixels == np.array(expected).reshape(1, 4, 1)).all()


def test_big_endian_16_bit():
    image = Image.new("I;16B", (2, 1), 257 * 77)
    assert np.asarray(to_mode(image, "L")).tolist() == [[77, 77]]


OUTSIDE = {
    "negative": (np.array([[-1, 5]], np.int32), "values from -1 to 5 are outside 0 to 65535"),
    "large": (np.array([[0, 70000]], np.int32), "values from 0 to 70000 are outside"),
    "nan": (np.array([[0, np.nan]], np.float32), "values from nan to nan are outside"),
    "infinite": (np.array([[0, np.inf]], np.float32), "values from 0 to inf are outside"),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_values_outside_every_range(case):
    array, message = OUTSIDE[case]
    with pytest.raises(ValueError, match=message):
        to_mode(Image.fromarray(array), "RGB")


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_images_of_8_bits_are_converted_as_pillow_does(mode):
    colour = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5)
    image = colour.convert("L").convert(mode) if mode in ("LA", "PA") else colour.convert(mode)
    assert np.array_equal(np.asarray(to_mode(image, "RGB")), np.asarray(image.convert("RGB")))


def test_a_16_bit_set_keeps_its_contrast(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, level in (("dark", 20000), ("light", 40000)):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(10):
                array = rng.integers(level, level + 5000, (8, 8), dtype=np.uint16)
                Image.fromarray(array).save(folder / f"{i}.png")
    data = load_images(str(tmp_path))
    streamed = ImageDataModule(open_stream(str(tmp_path), img_size=8), batch_size=4)
    images, labels = next(iter(streamed.scoring_dataloader("test")))
    for pixels, classes in ((data.test.images, data.test.labels), (images, labels)):
        levels = pixels.float().mean((1, 2, 3))
        assert levels[classes == 0].max() < 105 < levels[classes == 1].min()


def test_a_value_outside_is_a_bad_image_by_name(tmp_path):
    make_folder(tmp_path)
    Image.fromarray(np.full((8, 8), -1.0, np.float32)).save(tmp_path / "train/a/deep.tif")
    with pytest.raises(DataError, match=r"a/deep.tif: values from -1 to -1 are outside 0 to 65535; mend or remove"):
        load_images(str(tmp_path))
    assert "deep.tif" in load_images(str(tmp_path), on_bad_image="skip").skipped[0]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes there")
def test_a_pipe_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(OSError, match="not a regular file"):
        open_image(tmp_path / "pipe.png")
    folder = make_folder(tmp_path / "data")
    os.mkfifo(folder / "train/a/pipe.png")
    with pytest.raises(DataError, match=r"cannot read image .*a/pipe.png: not a regular file; mend or remove it"):
        load_images(str(folder))
    assert len(load_images(str(folder), on_bad_image="skip").train.labels) == 6


def test_a_side_too_large_is_refused_before_anything_is_made(tmp_path):
    make_folder(tmp_path)
    for make in (load_images, open_stream):
        with pytest.raises(DataError, match="img_size=99999999 makes images too large for memory; use at most 8192"):
            make(str(tmp_path), img_size=99999999)
    with pytest.raises(DataError, match=r"6 images of 8192 pixels need 1.1 GiB in memory, more than"):
        with_little_memory(tmp_path)
    check_side(LARGEST_SIDE)
    check_side(None)
    for wrong in (LARGEST_SIDE + 1, 0, -3, 2.5, True, "8"):
        with pytest.raises(DataError, match="img_size="):
            check_side(wrong)


def with_little_memory(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("statickey.data.images._LIMIT_BYTES", 2**30)
        patch.setattr("statickey.data.images.square", None)  # never reached
        load_images(str(folder), img_size=8192)


def test_digits_too_large():
    with pytest.raises(DataError, match=r"1797 images of 8000 pixels need 107.1 GiB"):
        load_images("digits", img_size=8000)


def test_oblong_images():
    assert to_mode(Image.new("L", (1000, 1)), "RGB").size == (1000, 1)
    assert square(Image.new("L", (30, 10)), 5).size == (5, 5)
    with pytest.raises(ValueError, match="1x1001 pixels are too oblong"):
        to_mode(Image.new("L", (1, 1001)), "RGB")
