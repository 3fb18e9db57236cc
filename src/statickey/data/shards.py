"""Images in webdataset shards: where they lie and what they show."""

import io
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ..errors import DataError
from .source import Source, Sources, check_numbered, data_files

SHARD_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_TEST_STEMS = ("test", "val")
_MOST_CLASSES = 1_000_000


class ShardImage(NamedTuple):
    """One sample of a shard: where the bytes of its image are, and its class."""

    path: Path
    key: str
    offset: int
    size: int
    label: int


def index_shard(path: Path) -> list[ShardImage]:
    """List the samples of an uncompressed tar file, in the order of their images.

    A sample is the files whose names agree up to the first dot: an image (``SHARD_SUFFIXES``) and a ``.cls`` with
    the number of its class as text. Other files are ignored.

    Raises:
        DataError: The file is torn, or a sample lacks its image or class or has two of them.
    """
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, bytes] = {}
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as shard:
            for member in shard:
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.lower().partition(".")
                if not member.isfile() or not stem or suffix not in (*SHARD_SUFFIXES, "cls"):
                    continue
                key = f"{folder}/{name[: len(stem)]}".removeprefix("/")
                if key in (labels if suffix == "cls" else images):
                    raise DataError(f"{path} sample {key} has a second .{suffix} file; give each sample its own key")
                if suffix != "cls":
                    images[key] = member
                elif (content := shard.extractfile(member)) is not None:
                    labels[key] = content.read()
            # tarfile takes an unreadable header for the end; a complete archive ends in blocks of zeros
            file.seek(shard.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no header and no end at byte {shard.offset}")
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"cannot read {path}: {error}; replace it with a whole, uncompressed tar file") from error
    for key in labels.keys() - images.keys():
        raise DataError(f"{path} sample {key} has a .cls but no image (.{', .'.join(SHARD_SUFFIXES)}); add it")
    return [
        ShardImage(path, key, image.offset_data, image.size, _class_number(path, key, labels.get(key)))
        for key, image in images.items()
    ]


def _class_number(path: Path, key: str, text: bytes | None) -> int:
    if text is None:
        raise DataError(f"{path} sample {key} has no .cls file; add one with the number of its class")
    try:
        return int(text)
    except ValueError as error:
        raise DataError(
            f"{path} sample {key} has {text[:20]!r} in its .cls; write the number of its class"
        ) from error


class _ShardSource(Source):
    """Images in tar files, read where they lie."""

    def __init__(self, images: Sequence[ShardImage]) -> None:
        self.images = images
        self.labels: list[int] = [image.label for image in images]

    def open(self, i: int) -> Image.Image:
        image = self.images[i]
        with image.path.open("rb") as file:
            file.seek(image.offset)
            return Image.open(io.BytesIO(file.read(image.size)))

    def names(self) -> Sequence[str]:
        """Shard and key of each sample."""
        return [f"{image.path.name}/{image.key}" for image in self.images]

    def describe(self, i: int) -> str:
        return f"{self.images[i].path} sample {self.images[i].key}"


def shard_files(root: Path) -> list[Path]:
    """The shards of a folder."""
    return data_files(root, "*.tar")


def shard_sources(root: Path) -> Sources:
    """The shards of train and of test, or else val; classes of ``classes.txt``, or all up to the highest number."""
    train, test = _shard_source(root, ("train",)), _shard_source(root, _TEST_STEMS)
    listing = root / "classes.txt"
    if listing.is_file():
        try:
            names = listing.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {listing}: {error}; write one name a line, in UTF-8") from error
        return Sources(train, test, tuple(name.strip() for name in names if name.strip()))
    highest = max([*train.labels, *test.labels], default=-1)
    if highest >= _MOST_CLASSES:
        raise DataError(f"{root} has a sample of class {highest}; number the classes from 0 on, without gaps")
    return Sources(train, test, tuple(map(str, range(highest + 1))))


def _shard_source(root: Path, stems: Sequence[str]) -> _ShardSource:
    found = shard_files(root)
    # the name may have the data set's own before: imagenet1k-train-0000.tar
    by_stem = ([path for path in found if re.search(rf"(^|[-_.]){stem}", path.name)] for stem in stems)
    shards = next(filter(None, by_stem), [])
    if not shards:
        names = ", ".join(path.name for path in found[:6])
        raise DataError(f"no {' or '.join(f'{s}*.tar' for s in stems)} under {root} (found {names})")
    check_numbered(shards)
    return _ShardSource([image for path in shards for image in index_shard(path)])
