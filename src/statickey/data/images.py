"""Labelled images in memory."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .._checks import check_choice
from ..errors import DataError
from .pixels import check_side, square
from .source import OnBadImage, Source, read_rgb
from .sources import open_sources

_LIMIT_BYTES = 4 * 2**30


@dataclass(frozen=True)
class LabelledImages:
    """Images (N, C, H, W) in uint8 and their labels (N,) in int64."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class ImageData:
    """A data set for training, with its test part."""

    name: str
    train: LabelledImages
    test: LabelledImages
    class_names: tuple[str, ...]
    crop_padding: int
    """Pixels of zero padding for the default random crop."""
    flip: bool
    """Whether the default augmentation mirrors images."""
    skipped: tuple[str, ...] = field(default=())
    """Unreadable images left out, with reasons."""

    @property
    def img_size(self) -> int:
        """Side of the square images in pixels."""
        return self.train.images.shape[-1]

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return self.train.images.shape[1]

    def fingerprint(self) -> str:
        """A hash of every pixel and label, to tell whether two runs saw the same data."""
        digest = hashlib.sha256()
        for part in (self.train, self.test):
            for tensor in (part.images, part.labels):
                digest.update(str(tuple(tensor.shape)).encode())
                digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()


def load_images(
    data: str,
    *,
    data_dir: Path | None = None,
    img_size: int | None = None,
    limit: int | None = None,
    on_bad_image: OnBadImage = "fail",
) -> ImageData:
    """Read a data set into memory.

    Args:
        data: ``"digits"`` (scikit-learn's 8 x 8 scans), a name of torchvision's such as ``"cifar10"``,
            ``"hf:NAME"`` on the Hugging Face hub, or a folder of images, parquet files or tar shards; see
            ``open_sources`` for all of them.
        data_dir: Where downloads are kept.
        img_size: Resize to this many pixels (shorter side, then centre crop); default: as stored.
        limit: Use this many training images, drawn once at random.
        on_bad_image: Refuse a data set with an unreadable image, or leave such images out.

    Returns:
        The training and test images, RGB except for digits.

    Raises:
        DataError: The data is missing, empty, inconsistent or unreadable; the message names the place.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit} must be a positive number; or leave it out")
    check_side(img_size)
    check_choice(on_bad_image=(on_bad_image, get_args(OnBadImage)))
    if data == "digits":
        return _digits(img_size, limit)
    sources = open_sources(data, data_dir)
    train, test, names = sources.train, sources.test, sources.class_names
    skipped: list[str] = []
    train_part = _read(train, draw_indices(len(train), limit), img_size, len(names), on_bad_image, skipped)
    side = train_part.images.shape[-1]
    test_part = _read(test, range(len(test)), side, len(names), on_bad_image, skipped)
    absent = set(test_part.labels.tolist()) - set(train_part.labels.tolist())
    if absent:
        raise DataError(
            f"class {names[min(absent)]!r} has test images but no training image is left of {data} "
            f"(limit={limit}, {len(skipped)} unreadable); raise --limit or mend the data"
        )
    return ImageData(data, train_part, test_part, names, side // 8, sources.flip, tuple(skipped))


def draw_indices(total: int, limit: int | None) -> Sequence[int]:
    """Which of ``total`` images a ``limit`` leaves, drawn once at random, in their order."""
    if limit is None or limit >= total:
        return range(total)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    return sorted(order[:limit].tolist())


def read_digits() -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """scikit-learn's scans of digits (N, 8, 8), their labels (N,), and which of them are for training and testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    scans = np.rint(raw.images * (255 / 16)).astype(np.uint8)
    labels = raw.target.astype(np.int64)
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=raw.target, random_state=0)
    return scans, labels, train, test


def _digits(img_size: int | None, limit: int | None) -> ImageData:
    scans, targets, train, test = read_digits()
    if img_size is not None:
        _check_memory(len(scans), img_size, 1)
        scans = np.stack([np.asarray(square(Image.fromarray(scan), img_size)) for scan in scans])
    images = torch.from_numpy(scans).unsqueeze(1)
    labels = torch.from_numpy(targets)
    train = train[np.asarray(draw_indices(len(train), limit))]
    train_part, test_part = (LabelledImages(images[index], labels[index]) for index in (train, test))
    return ImageData("digits", train_part, test_part, tuple("0123456789"), 0, False)


def _read(
    source: Source,
    indices: Sequence[int],
    img_size: int | None,
    num_classes: int,
    on_bad_image: OnBadImage,
    skipped: list[str],
) -> LabelledImages:
    if img_size is not None:
        _check_memory(len(indices), img_size, 3)
    pixels = np.empty((0, 0, 0, 3), np.uint8)
    labels: list[int] = []
    for i in indices:
        label = source.label(i, num_classes)
        image = read_rgb(source, i, on_bad_image)
        if isinstance(image, str):
            skipped.append(image)
            continue
        array = np.asarray(square(image, img_size))
        if not labels:
            pixels = _allocate(array, len(indices), source.describe(i))
        if array.shape != pixels.shape[1:]:
            raise DataError(
                f"{source.describe(i)} is {array.shape[1]}x{array.shape[0]} pixels, others are "
                f"{pixels.shape[2]}x{pixels.shape[1]}; pass --img-size to bring all to one size"
            )
        pixels[len(labels)] = array
        labels.append(label)
    if not labels:
        raise DataError(f"no readable image left; the first bad one is {skipped[0]}")
    images = torch.from_numpy(pixels[: len(labels)]).permute(0, 3, 1, 2).contiguous()
    return LabelledImages(images, torch.tensor(labels))


def _allocate(first: NDArray[np.uint8], count: int, name: str) -> NDArray[np.uint8]:
    if first.shape[0] != first.shape[1]:
        raise DataError(
            f"{name} is {first.shape[1]}x{first.shape[0]} pixels, not square; pass --img-size to crop all to squares"
        )
    _check_memory(count, first.shape[0], first.shape[2])
    return np.empty((count, *first.shape), np.uint8)


def _check_memory(count: int, img_size: int, in_chans: int) -> None:
    size = count * img_size**2 * in_chans
    if size > _LIMIT_BYTES:
        raise DataError(
            f"{count} images of {img_size} pixels need {size / 2**30:.1f} GiB in memory, more than "
            f"{_LIMIT_BYTES / 2**30:.0f}; use a smaller --img-size or --limit, or --stream"
        )
