"""From a file to the pixels a network sees: opening, bringing to 8 bits, resizing, normalising."""

import math
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import DataError

UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, EOFError, Image.DecompressionBombError)
"""What opening and decoding a broken image raises."""
LARGEST_SIDE = 8192
"""Pixels of the largest square an image may be brought to."""
_LONGEST = 1000  # times the shorter side: bringing that one to a size makes the longer one enormous


def open_image(path: Path) -> Image.Image:
    """Open an image file, possibly without decoding it; raises one of ``UNREADABLE``, also for a pipe or a device."""
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait forever for a writer
        raise OSError("not a regular file")
    return Image.open(path)


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """An image in 8 bits, ``"RGB"`` or ``"L"``, the range of its type to 0 to 255.

    16-bit images are scaled by 65535. 32-bit ones name no range: theirs is the smallest of 255 and 65535 (integers,
    those of PNG and PGM files always 65535) or of 1, 255 and 65535 (floats) that holds all values of the image.
    Images of 8 bits and fewer, and those with a palette, are converted as Pillow does; transparency is dropped.

    Raises:
        ValueError: Values outside these ranges or not finite, an image that is over 1000 times as long as wide, or
            colours that Pillow cannot convert.
    """
    if max(image.size) > _LONGEST * min(image.size):
        raise ValueError(f"{image.width}x{image.height} pixels are too oblong")
    if image.mode.startswith("I;16"):
        ranges: tuple[int, ...] = (65535,)
    elif image.mode == "I":
        ranges = (65535,) if image.format in ("PNG", "PPM") else (255, 65535)
    elif image.mode == "F":
        ranges = (1, 255, 65535)
    else:
        return image.convert(mode)
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    full = next((top for top in ranges if low >= 0 and high <= top), None)
    if full is None:
        raise ValueError(f"values from {low:g} to {high:g} are outside 0 to {ranges[-1]}")
    return Image.fromarray(np.rint(values * (255 / full)).astype(np.uint8)).convert(mode)


def check_side(img_size: int | None) -> None:
    """Refuse a side in pixels that is no whole number from 1 to ``LARGEST_SIDE``.

    Raises:
        DataError: It is another value than these and None.
    """
    if img_size is None:
        return
    if not isinstance(img_size, int) or isinstance(img_size, bool) or img_size < 1:
        raise DataError(f"img_size={img_size!r} must be a positive number; or leave it out")
    if img_size > LARGEST_SIDE:
        raise DataError(f"img_size={img_size} makes images too large for memory; use at most {LARGEST_SIDE}")


def square(image: Image.Image, img_size: int | None) -> Image.Image:
    """Resize the shorter side and crop the centre; as it is when no size is asked for."""
    if img_size is None or image.size == (img_size, img_size):
        return image
    width, height = image.size
    factor = img_size / min(width, height)
    image = image.resize(
        (max(round(width * factor), img_size), max(round(height * factor), img_size)),
        Image.Resampling.BICUBIC,
    )
    left, top = (image.width - img_size) // 2, (image.height - img_size) // 2
    return image.crop((left, top, left + img_size, top + img_size))


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Images in uint8 to zero mean and unit variance, float32."""
    return (images.float() / 255 - mean) / std


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, (C, 1, 1) each, of images in [0, 1]."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in images.transpose(0, 1)])
    weights = counts.double() / counts.sum(dim=1, keepdim=True)
    mean = weights @ levels
    std = (weights @ levels.square() - mean.square()).clamp_min(1e-8).sqrt()
    return mean.float().view(-1, 1, 1), std.float().view(-1, 1, 1)


def per_channel(name: str, values: Sequence[float], in_chans: int) -> Tensor:
    """A mean or standard deviation as a user gave it, (C, 1, 1).

    Raises:
        DataError: Not a finite number for each channel, or a ``std`` that is not positive.
    """
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise DataError(f"{name}={values!r} must be {in_chans} numbers, one for each channel")
    if len(values) != in_chans:
        raise DataError(f"{name}={list(values)} has {len(values)} numbers for images of {in_chans} channels")
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        raise DataError(f"{name}={list(values)} must hold finite numbers")
    if name == "std" and min(values) <= 0:
        raise DataError(f"std={list(values)} must be positive: images are divided by it")
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
