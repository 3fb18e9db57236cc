"""Where images come from: one name or folder, and the kind of data that is there."""

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..errors import DataError
from .folders import folder_sources
from .shards import shard_files, shard_sources
from .source import Sources
from .tables import HUB, hub_sources, parquet_files, parquet_sources
from .torchvision_sets import TORCHVISION_SETS, torchvision_sources


def open_sources(data: str, data_dir: Path | None = None) -> Sources:
    """Find the images of a data set without decoding them.

    A class without a test image is allowed, with a warning, as the score says nothing about it. Hidden files are
    ignored. A gap in a numbered set of parquet files or shards is refused.

    Args:
        data: A name of torchvision's (``cifar10``, ``cifar100``, ``mnist``, ``fashion_mnist``, ``svhn``,
            ``stl10``, ``food101``, ``flowers102``), ``hf:NAME`` or ``hf:OWNER/NAME/CONFIG`` on the Hugging Face
            hub, ``hf:DIR`` for a local data set of that library, or a folder that holds one of: images,
            ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg`` (or else ``validation`` or ``test``, in this order);
            parquet files, ``train*.parquet`` and ``test*.parquet`` (or else ``val*.parquet``), of Hugging Face or
            with a column of bytes and one of integers or text, whose sorted training values are the classes;
            webdataset shards, ``train*.tar`` and ``test*.tar`` (or else ``val*.tar``), with an optional
            ``classes.txt``, one name per line.
        data_dir: Where downloads are kept; default ``data`` for torchvision, its own cache for Hugging Face.

    Raises:
        DataError: The data is missing, torn or inconsistent; the message names the place.
    """
    if data in TORCHVISION_SETS:
        sources = torchvision_sources(data, data_dir)
    elif data.startswith(HUB):
        sources = hub_sources(data.removeprefix(HUB), data_dir)
    elif not data or not (root := Path(data)).is_dir():
        raise DataError(
            f"data {data!r} is neither a folder nor one of digits, {', '.join(TORCHVISION_SETS)}, {HUB}NAME; give "
            "the path of an image folder (train/CLASS/*.jpg, val/CLASS/*.jpg), of parquet files or of tar shards"
        )
    elif parquet_files(root, ""):
        sources = parquet_sources(root, data_dir)
    elif not (root / "train").is_dir() and shard_files(root):
        sources = shard_sources(root)
    else:
        sources = folder_sources(root)
    check_names(data, sources.class_names)
    for split, source in (("train", sources.train), ("test", sources.test)):
        if not len(source):
            raise DataError(f"the {split} part of {data} has no image; add some")
    untested = set(sources.train.labels) - set(sources.test.labels)
    numbers = sorted(label for label in untested if label is not None and 0 <= label < len(sources.class_names))
    if numbers:
        warnings.warn(
            f"{data} has no test image of class {sources.class_names[numbers[0]]!r}"
            f"{f' and {len(numbers) - 1} others' if len(numbers) > 1 else ''}; the score says nothing of it",
            stacklevel=2,
        )
    return sources


def check_names(data: str, names: Sequence[str]) -> None:
    """Refuse names of classes that results could not be written with, or be told apart by.

    Raises:
        DataError: Two are the same, or one is not UTF-8.
    """
    for name, count in Counter(names).items():
        if count > 1:
            raise DataError(f"{data} has {count} classes {name!r}; give each a name of its own")
        if name.encode(errors="replace").decode() != name:
            raise DataError(f"the class name {name!r} of {data} is not UTF-8; rename it")
