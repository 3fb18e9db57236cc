"""Data sets that torchvision downloads."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image

from ..errors import DataError
from .source import FileSource, Source, Sources


class _ArraySource(Source):
    """Images in one array, (N, H, W) or (N, H, W, 3) in uint8."""

    def __init__(self, name: str, images: NDArray[np.uint8], labels: Sequence[int]) -> None:
        self.name, self.images, self.labels = name, images, labels

    def open(self, i: int) -> Image.Image:
        return Image.fromarray(self.images[i])

    def describe(self, i: int) -> str:
        return f"{self.name} image {i}"


class _TorchvisionSet(NamedTuple):
    """How a class of torchvision is called, and where it keeps images and labels."""

    name: str
    options: tuple[Mapping[str, Any], Mapping[str, Any]] = ({"split": "train"}, {"split": "test"})
    images: Literal["data", "_image_files"] = "data"
    labels: Literal["targets", "labels", "_labels"] = "labels"
    channels_first: bool = False
    flip: bool = True


_BY_FLAG = ({"train": True}, {"train": False})
TORCHVISION_SETS = {
    "cifar10": _TorchvisionSet("CIFAR10", _BY_FLAG, labels="targets"),
    "cifar100": _TorchvisionSet("CIFAR100", _BY_FLAG, labels="targets"),
    "mnist": _TorchvisionSet("MNIST", _BY_FLAG, labels="targets", flip=False),
    "fashion_mnist": _TorchvisionSet("FashionMNIST", _BY_FLAG, labels="targets"),
    "svhn": _TorchvisionSet("SVHN", channels_first=True, flip=False),
    "stl10": _TorchvisionSet("STL10", channels_first=True),
    "food101": _TorchvisionSet("Food101", images="_image_files", labels="_labels"),
    "flowers102": _TorchvisionSet("Flowers102", images="_image_files", labels="_labels"),
}


def torchvision_sources(data: str, data_dir: Path | None) -> Sources:
    """One of ``TORCHVISION_SETS``, downloaded where it is not there yet."""
    from torchvision import datasets

    known = TORCHVISION_SETS[data]
    root = Path("data") if data_dir is None else data_dir
    try:
        parts = _torchvision_parts(getattr(datasets, known.name), root, known)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{data} is not under data_dir={str(root)!r} and cannot be downloaded ({error}); "
            "put torchvision's archive there, or point --data-dir at a folder that has it"
        ) from error
    train, test = (_torchvision_source(data, part, known) for part in parts)
    names = getattr(parts[0], "classes", None)  # SVHN names none
    if names is None:
        names = [str(label) for label in range(max(filter(None, train.labels)) + 1)]
    return Sources(train, test, tuple(names), known.flip)


def _torchvision_parts(cls: Any, root: Path, known: _TorchvisionSet) -> list[Any]:
    """Both parts, downloaded if they are missing; torchvision checks the MD5 of what it reads."""
    try:
        return [cls(root=root, download=False, **options) for options in known.options]
    except RuntimeError:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".download.lock"):  # the processes of one run ask at once
            return [cls(root=root, download=True, **options) for options in known.options]


def _torchvision_source(data: str, part: Any, known: _TorchvisionSet) -> Source:
    labels = [int(label) for label in getattr(part, known.labels)]
    images = getattr(part, known.images)
    if known.images == "_image_files":
        return FileSource(images, labels)
    array = np.asarray(images)
    return _ArraySource(data, array.transpose(0, 2, 3, 1) if known.channels_first else array, labels)
