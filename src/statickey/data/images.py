"""Labelled images in memory, and the four places they can come from."""

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..errors import DataError

OnBadImage = Literal["fail", "skip"]
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
TORCHVISION_SETS = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}
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


@dataclass(frozen=True)
class _Source:
    """Where one split's images are: labels now, pixels on demand."""

    labels: Sequence[int | None]
    open: Callable[[int], Image.Image]
    describe: Callable[[int], str]


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
        data: ``"digits"`` (scikit-learn's 8 x 8 scans), ``"cifar10"`` or ``"cifar100"`` (torchvision, kept
            under ``data_dir``), a folder ``DIR/train/CLASS/*.jpg`` with ``DIR/val`` alike, or a folder of
            Hugging Face parquet files, ``train*.parquet`` and ``test*.parquet``.
        data_dir: Where torchvision keeps its downloads.
        img_size: Resize to this many pixels (shorter side, then centre crop); default: as stored.
        limit: Use this many training images, drawn once at random.
        on_bad_image: Refuse a data set with an unreadable image, or leave such images out.

    Returns:
        The training and test images, RGB except for digits.

    Raises:
        DataError: The data is missing, empty, inconsistent or unreadable; the message names the place.
    """
    for name, value in (("limit", limit), ("img_size", img_size)):
        if value is not None and value < 1:
            raise DataError(f"{name}={value} must be a positive number; or leave it out")
    if on_bad_image not in ("fail", "skip"):
        raise DataError(f"on_bad_image={on_bad_image!r} must be 'fail' or 'skip'")
    if data == "digits":
        return _digits(img_size, limit)
    if data in TORCHVISION_SETS:
        train, test, names = _torchvision_sources(data, data_dir)
    else:
        root = Path(data)
        if not root.is_dir():
            raise DataError(
                f"data {data!r} is neither a folder nor one of digits, {', '.join(TORCHVISION_SETS)}; "
                "give the path of an image folder (train/CLASS/*.jpg, val/CLASS/*.jpg) or of parquet files"
            )
        if _parquet_files(root, ""):
            train, test, names = _parquet_sources(root)
        else:
            train, test, names = _folder_sources(root)
    for split, source in (("train", train), ("test", test)):
        if not source.labels:
            raise DataError(f"the {split} part of {data} has no image; add some")
    skipped: list[str] = []
    train_part = _read(train, _chosen(len(train.labels), limit), img_size, len(names), on_bad_image, skipped)
    test_part = _read(
        test,
        range(len(test.labels)),
        train_part.images.shape[-1],
        len(names),
        on_bad_image,
        skipped,
    )
    absent = set(test_part.labels.tolist()) - set(train_part.labels.tolist())
    if absent:
        raise DataError(
            f"class {names[min(absent)]!r} has test images but no training image is left of {data} "
            f"(limit={limit}, {len(skipped)} unreadable); raise --limit or mend the data"
        )
    pad = train_part.images.shape[-1] // 8
    return ImageData(data, train_part, test_part, tuple(names), pad, True, tuple(skipped))


def _chosen(total: int, limit: int | None) -> Sequence[int]:
    if limit is None or limit >= total:
        return range(total)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    return sorted(order[:limit].tolist())


def _digits(img_size: int | None, limit: int | None) -> ImageData:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if img_size not in (None, 8):
        raise DataError(f"img_size={img_size}: digits are 8 x 8 scans; leave img_size out")
    raw = load_digits()
    images = torch.from_numpy(np.rint(raw.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(raw.target.astype(np.int64))
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=raw.target, random_state=0)
    train = train[np.asarray(_chosen(len(train), limit))]
    train_part, test_part = (LabelledImages(images[index], labels[index]) for index in (train, test))
    return ImageData("digits", train_part, test_part, tuple("0123456789"), 0, False)


def _torchvision_sources(data: str, data_dir: Path | None) -> tuple[_Source, _Source, list[str]]:
    from torchvision import datasets

    root = Path("data") if data_dir is None else data_dir
    cls = getattr(datasets, TORCHVISION_SETS[data])
    try:
        # torchvision checks the MD5 of every file before it reads one
        parts = [cls(root=root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{data} is not under data_dir={str(root)!r} and cannot be downloaded ({error}); "
            "put torchvision's archive there, or point --data-dir at a folder that has it"
        ) from error

    def source(part: Any) -> _Source:
        return _Source(part.targets, lambda i: Image.fromarray(part.data[i]), lambda i: f"{data} image {i}")

    return source(parts[0]), source(parts[1]), list(parts[0].classes)


def _parquet_files(root: Path, stem: str) -> list[Path]:
    """Parquet files in the folder or one level below, where the hub keeps them."""
    return sorted([*root.glob(f"{stem}*.parquet"), *root.glob(f"*/{stem}*.parquet")])


def _parquet_sources(root: Path) -> tuple[_Source, _Source, list[str]]:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    def table(*stems: str) -> Any:
        files: list[Path] = next(filter(None, (_parquet_files(root, stem) for stem in stems)), [])
        if not files:
            found = ", ".join(path.name for path in _parquet_files(root, "")[:6])
            raise DataError(f"no {' or '.join(f'{s}*.parquet' for s in stems)} under {root} (found {found})")
        tables = []
        for path in files:
            try:
                tables.append(pq.read_table(path))
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"cannot read {path}: {error}; replace this file") from error
        try:
            return datasets.Dataset(datasets.table.InMemoryTable(pa.concat_tables(tables)))
        except pa.ArrowException as error:
            raise DataError(f"the parquet files under {root} differ in their columns: {error}") from error

    def source(part: Any) -> _Source:
        features = part.features
        image = next((k for k, v in features.items() if isinstance(v, datasets.Image)), None)
        label = next((k for k, v in features.items() if isinstance(v, datasets.ClassLabel)), None)
        if image is None or label is None:
            raise DataError(f"{root} needs an Image and a ClassLabel column; its columns are {features}")
        raw = part.cast_column(image, datasets.Image(decode=False))
        labels = part.data.column(label).to_pylist()

        def opened(i: int) -> Image.Image:
            cell = raw[i][image]
            if cell is None:
                raise ValueError("the cell is empty")
            return Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"])

        def describe(i: int) -> str:
            cell = raw[i][image]
            return f"{root} row {i}" + (f" ({cell['path']})" if cell and cell["path"] else "")

        return _Source(labels, opened, describe)

    def class_names(part: Any) -> list[str]:
        return next((list(v.names) for v in part.features.values() if isinstance(v, datasets.ClassLabel)), [])

    train, test = table("train"), table("test", "val")
    sources = source(train), source(test)
    if class_names(train) != class_names(test):
        raise DataError(
            f"the class names in {root} differ: {class_names(train)} in train, {class_names(test)} in test"
        )
    return *sources, class_names(train)


def _folder_sources(root: Path) -> tuple[_Source, _Source, list[str]]:
    def listing(split: str) -> dict[str, list[Path]]:
        folder = root / split
        if not folder.is_dir():
            raise DataError(f"{folder} is missing; an image folder has {root}/train/CLASS and {root}/val/CLASS")
        classes = {
            sub.name: sorted(p for p in sub.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            for sub in sorted(folder.iterdir())
            if sub.is_dir()
        }
        empty = [name for name, files in classes.items() if not files]
        if empty or not classes:
            where = folder / empty[0] if empty else folder
            raise DataError(f"{where} holds no image; put files there ({', '.join(sorted(IMAGE_SUFFIXES))})")
        return classes

    train, val = listing("train"), listing("val")
    unknown = sorted(set(val) - set(train))
    if unknown:
        raise DataError(
            f"class {unknown[0]!r} is in {root / 'val'} but not in {root / 'train'}; "
            "add training images of it or remove it from val"
        )
    names = sorted(train)

    def source(classes: dict[str, list[Path]]) -> _Source:
        files = [(path, names.index(name)) for name, paths in classes.items() for path in paths]
        labels = [label for _, label in files]
        return _Source(labels, lambda i: Image.open(files[i][0]), lambda i: str(files[i][0]))

    return source(train), source(val), names


def _read(
    source: _Source,
    indices: Sequence[int],
    img_size: int | None,
    num_classes: int,
    on_bad_image: OnBadImage,
    skipped: list[str],
) -> LabelledImages:
    pixels = np.empty((0, 0, 0, 3), np.uint8)
    labels: list[int] = []
    for i in indices:
        label = source.labels[i]
        if label is None or not 0 <= label < num_classes:
            raise DataError(f"{source.describe(i)} has label {label}, outside the {num_classes} classes")
        try:
            with source.open(i) as image:
                array = np.asarray(_square(image.convert("RGB"), img_size))
        except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as error:
            reason = f"{source.describe(i)}: {error}"
            if on_bad_image == "fail":
                raise DataError(
                    f"cannot read image {reason}; mend or remove it, or pass --on-bad-image skip"
                ) from error
            skipped.append(reason)
            continue
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
    size = first.nbytes * count
    if size > _LIMIT_BYTES:
        raise DataError(
            f"{count} images of {first.shape[0]} pixels need {size / 2**30:.1f} GiB in memory, more than "
            f"{_LIMIT_BYTES / 2**30:.0f}; use a smaller --img-size or --limit"
        )
    return np.empty((count, *first.shape), np.uint8)


def _square(image: Image.Image, img_size: int | None) -> Image.Image:
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
