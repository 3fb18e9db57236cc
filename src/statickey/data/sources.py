"""Where images come from: their labels at once, their pixels on demand, in any process."""

import io
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image

from ..errors import DataError
from .shards import ShardImage, index_shard

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, EOFError, Image.DecompressionBombError)
"""What opening and decoding a broken image raises."""
_HUB = "hf:"
_TEST_STEMS = ("test", "val")
_IN_MEMORY_BYTES = 2**30


class Source(ABC):
    """The images of one split: picklable, so that spawned workers can read them."""

    labels: Sequence[int | None]

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def open(self, i: int) -> Image.Image:
        """Image ``i``, perhaps not decoded yet; raises one of ``UNREADABLE``."""

    @abstractmethod
    def describe(self, i: int) -> str:
        """Where image ``i`` is, for messages."""

    def label(self, i: int, num_classes: int) -> int:
        """Class of image ``i``.

        Raises:
            DataError: It has none, or one outside the classes.
        """
        label = self.labels[i]
        if label is None or not 0 <= label < num_classes:
            raise DataError(f"{self.describe(i)} has label {label}, outside the {num_classes} classes")
        return label


@dataclass(frozen=True)
class Sources:
    """Both parts of a data set and the names of its classes."""

    train: Source
    test: Source
    class_names: tuple[str, ...]
    flip: bool = True
    """Whether an image may be mirrored and still be of its class."""


def open_sources(data: str, data_dir: Path | None = None) -> Sources:
    """Find the images of a data set without decoding them.

    Args:
        data: A name of torchvision's (``cifar10``, ``cifar100``, ``mnist``, ``fashion_mnist``, ``svhn``,
            ``stl10``, ``food101``, ``flowers102``), ``hf:NAME`` or ``hf:OWNER/NAME/CONFIG`` on the Hugging Face
            hub, ``hf:DIR`` for a local data set of that library, or a folder that holds one of: images,
            ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg``; Hugging Face parquet files, ``train*.parquet`` and
            ``test*.parquet``; webdataset shards, ``train*.tar`` and ``val*.tar`` or ``test*.tar``, with an
            optional ``classes.txt``, one name per line.
        data_dir: Where downloads are kept; default ``data`` for torchvision, its own cache for Hugging Face.

    Raises:
        DataError: The data is missing, torn or inconsistent; the message names the place.
    """
    if data in TORCHVISION_SETS:
        sources = _torchvision_sources(data, data_dir)
    elif data.startswith(_HUB):
        sources = _hub_sources(data.removeprefix(_HUB), data_dir)
    elif not (root := Path(data)).is_dir():
        raise DataError(
            f"data {data!r} is neither a folder nor one of digits, {', '.join(TORCHVISION_SETS)}, {_HUB}NAME; give "
            "the path of an image folder (train/CLASS/*.jpg, val/CLASS/*.jpg), of parquet files or of tar shards"
        )
    elif _parquet_files(root, ""):
        sources = _parquet_sources(root, data_dir)
    elif not (root / "train").is_dir() and any(root.glob("*.tar")):
        sources = _shard_sources(root)
    else:
        sources = _folder_sources(root)
    for split, source in (("train", sources.train), ("test", sources.test)):
        if not len(source):
            raise DataError(f"the {split} part of {data} has no image; add some")
    return sources


class _FileSource(Source):
    """Images in files of their own."""

    def __init__(self, files: Sequence[Path], labels: Sequence[int]) -> None:
        self.files, self.labels = files, labels

    def open(self, i: int) -> Image.Image:
        return Image.open(self.files[i])

    def describe(self, i: int) -> str:
        return str(self.files[i])


class _ArraySource(Source):
    """Images in one array, (N, H, W) or (N, H, W, 3) in uint8."""

    def __init__(self, name: str, images: NDArray[np.uint8], labels: Sequence[int]) -> None:
        self.name, self.images, self.labels = name, images, labels

    def open(self, i: int) -> Image.Image:
        return Image.fromarray(self.images[i])

    def describe(self, i: int) -> str:
        return f"{self.name} image {i}"


class _TableSource(Source):
    """Images in a ``datasets.Dataset``, with the file name or the bytes of each in a column."""

    def __init__(self, place: str, table: Any) -> None:
        import datasets

        features = table.features
        image = next((k for k, v in features.items() if isinstance(v, datasets.Image)), None)
        label = next((k for k, v in features.items() if isinstance(v, datasets.ClassLabel)), None)
        if image is None or label is None:
            raise DataError(f"{place} needs an Image and a ClassLabel column; its columns are {features}")
        self.place, self.column = place, image
        self.table = table.cast_column(image, datasets.Image(decode=False))
        self.labels: list[int | None] = table.data.column(label).to_pylist()
        self.class_names: tuple[str, ...] = tuple(features[label].names)

    def open(self, i: int) -> Image.Image:
        cell = self.table[i][self.column]
        if cell is None:
            raise ValueError("the cell is empty")
        return Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"])

    def describe(self, i: int) -> str:
        cell = self.table[i][self.column]
        return f"{self.place} row {i}" + (f" ({cell['path']})" if cell and cell["path"] else "")


class _ShardSource(Source):
    """Images in tar files, read where they lie: the number of the file and the place in it of each."""

    def __init__(self, shards: Sequence[Path], places: Sequence[tuple[int, ShardImage]]) -> None:
        self.shards, self.places = shards, places
        self.labels = [image.label for _, image in places]

    def open(self, i: int) -> Image.Image:
        shard, image = self.places[i]
        with self.shards[shard].open("rb") as file:
            file.seek(image.offset)
            return Image.open(io.BytesIO(file.read(image.size)))

    def describe(self, i: int) -> str:
        shard, image = self.places[i]
        return f"{self.shards[shard]} sample {image.key}"


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


def _torchvision_sources(data: str, data_dir: Path | None) -> Sources:
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
    """The parts as they lie there, or else downloaded; torchvision checks the MD5 of what it reads."""
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
        return _FileSource(images, labels)
    array = np.asarray(images)
    return _ArraySource(data, array.transpose(0, 2, 3, 1) if known.channels_first else array, labels)


def _hub_sources(name: str, data_dir: Path | None) -> Sources:
    import datasets

    path, config = name, None
    if name.count("/") == 2 and all(name.split("/")) and not Path(name).exists():
        path, _, config = name.rpartition("/")
    try:
        splits = datasets.load_dataset(path, config, cache_dir=None if data_dir is None else str(data_dir))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"cannot load {_HUB}{name} ({reason}); check the name and the network, or give a folder that has it"
        ) from error
    parts = {split: _TableSource(f"{_HUB}{name} {split}", table) for split, table in splits.items()}
    # the hub's test split often comes without labels: each is then null or -1
    tests = [parts[split] for split in ("test", "validation", "val") if split in parts]
    labelled = [part for part in tests if any(label is not None and label >= 0 for label in part.labels)]
    if "train" not in parts or not labelled:
        raise DataError(f"{_HUB}{name} needs labelled splits train and test or validation; it has {', '.join(parts)}")
    return _paired(f"{_HUB}{name}", parts["train"], labelled[0])


def _paired(place: str, train: _TableSource, test: _TableSource) -> Sources:
    names = train.class_names
    if names != test.class_names:
        raise DataError(
            f"the class names in {place} differ: {list(names)} in train, {list(test.class_names)} in test; "
            "write both parts with the same ones"
        )
    return Sources(train, test, names)


def _parquet_files(root: Path, stem: str) -> list[Path]:
    """Parquet files in the folder or one level below, where the hub keeps them."""
    return sorted([*root.glob(f"{stem}*.parquet"), *root.glob(f"*/{stem}*.parquet")])


def _parquet_sources(root: Path, data_dir: Path | None) -> Sources:
    train, test = (
        _TableSource(f"{root} {split}", _parquet_table(root, stems, data_dir))
        for split, stems in (("train", ("train",)), ("test", _TEST_STEMS))
    )
    return _paired(str(root), train, test)


def _parquet_table(root: Path, stems: Sequence[str], data_dir: Path | None) -> Any:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    files: list[Path] = next(filter(None, (_parquet_files(root, stem) for stem in stems)), [])
    if not files:
        found = ", ".join(path.name for path in _parquet_files(root, "")[:6])
        raise DataError(f"no {' or '.join(f'{s}*.parquet' for s in stems)} under {root} (found {found})")
    in_memory = sum(path.stat().st_size for path in files) <= _IN_MEMORY_BYTES
    tables = []
    for path in files:
        try:
            tables.append(pq.read_table(path) if in_memory else pq.read_schema(path))
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"cannot read {path}: {error}; replace this file") from error
    try:
        if in_memory:
            return datasets.Dataset(datasets.table.InMemoryTable(pa.concat_tables(tables)))
        # a copy in the library's cache, mapped into memory as it is read
        cache = None if data_dir is None else str(data_dir)
        return datasets.Dataset.from_parquet([str(path) for path in files], cache_dir=cache)
    except pa.ArrowException as error:
        raise DataError(f"the parquet files under {root} differ in their columns: {error}") from error
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"cannot unpack the parquet files under {root}: {error}; mend them or free space") from error


def _folder_sources(root: Path) -> Sources:
    train, val = _class_files(root, "train"), _class_files(root, "val")
    unknown = sorted(set(val) - set(train))
    if unknown:
        raise DataError(
            f"class {unknown[0]!r} is in {root / 'val'} but not in {root / 'train'}; "
            "add training images of it or remove it from val"
        )
    names = sorted(train)
    return Sources(_class_source(train, names), _class_source(val, names), tuple(names))


def _class_source(classes: Mapping[str, Sequence[Path]], names: Sequence[str]) -> Source:
    numbers = {name: number for number, name in enumerate(names)}
    files = [path for paths in classes.values() for path in paths]
    return _FileSource(files, [numbers[name] for name, paths in classes.items() for _ in paths])


def _class_files(root: Path, split: str) -> dict[str, list[Path]]:
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


def _shard_sources(root: Path) -> Sources:
    train, test = _shard_source(root, ("train",)), _shard_source(root, _TEST_STEMS)
    listing = root / "classes.txt"
    if listing.is_file():
        names = listing.read_text(encoding="utf-8").split("\n")
        return Sources(train, test, tuple(name.strip() for name in names if name.strip()))
    highest = max((label for part in (train, test) for label in part.labels if label is not None), default=-1)
    return Sources(train, test, tuple(map(str, range(highest + 1))))


def _shard_source(root: Path, stems: Sequence[str]) -> _ShardSource:
    found = sorted(root.glob("*.tar"))
    # the name may have the data set's own before: imagenet1k-train-0000.tar
    by_stem = ([path for path in found if re.search(rf"(^|[-_.]){stem}", path.name)] for stem in stems)
    shards = next(filter(None, by_stem), [])
    if not shards:
        names = ", ".join(path.name for path in found[:6])
        raise DataError(f"no {' or '.join(f'{s}*.tar' for s in stems)} under {root} (found {names})")
    places: list[tuple[int, ShardImage]] = []
    for number, path in enumerate(shards):
        places.extend((number, image) for image in index_shard(path))
    return _ShardSource(shards, places)
