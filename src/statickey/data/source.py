"""What every kind of data gives: labels at once, pixels on demand, in any process."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from PIL import Image

from ..errors import DataError
from .pixels import UNREADABLE, open_image, to_mode

OnBadImage = Literal["fail", "skip"]


class DataSet(Protocol):
    """Data that a task learns from, read or ready to be read."""

    @property
    def name(self) -> str:
        """What the user called it."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes."""

    @property
    def in_chans(self) -> int:
        """Channels of the images."""

    @property
    def skipped(self) -> tuple[str, ...]:
        """Unreadable images left out, with reasons."""

    def fingerprint(self) -> str:
        """A hash to tell whether two runs saw the same data."""


class Source(ABC):
    """The images of one split: picklable, so that spawned workers can read them."""

    labels: Sequence[int | None]

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def open(self, i: int) -> Image.Image:
        """Image ``i``, possibly not decoded yet; raises one of ``UNREADABLE``."""

    @abstractmethod
    def describe(self, i: int) -> str:
        """Where image ``i`` is, for messages."""

    def names(self) -> Sequence[str]:
        """What images are called within the data set, in their order; none where they have no names."""
        return ()

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


class FileSource(Source):
    """Images in files of their own."""

    def __init__(self, files: Sequence[Path], labels: Sequence[int]) -> None:
        self.files, self.labels = files, labels

    def open(self, i: int) -> Image.Image:
        """The image in its file."""
        return open_image(self.files[i])

    def describe(self, i: int) -> str:
        """The path of its file."""
        return str(self.files[i])

    def names(self) -> Sequence[str]:
        """Folder and name of each file."""
        return ["/".join(file.parts[-2:]) for file in self.files]


class SourcePart(Source):
    """Some images of a source."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.source, self.indices = source, indices
        self.labels = [source.labels[i] for i in indices]

    def open(self, i: int) -> Image.Image:
        """The image in the whole source."""
        return self.source.open(self.indices[i])

    def describe(self, i: int) -> str:
        """Its place in the whole source."""
        return self.source.describe(self.indices[i])


def read_rgb(source: Source, i: int, on_bad_image: OnBadImage) -> Image.Image | str:
    """Image ``i`` in RGB, or, where bad images are skipped, which it is and why it cannot be read.

    Raises:
        DataError: It cannot be read, and bad images are not skipped.
    """
    try:
        with source.open(i) as image:
            return to_mode(image, "RGB")
    except UNREADABLE as error:
        reason = f"{source.describe(i)}: {error}"
        if on_bad_image == "fail":
            raise DataError(f"cannot read image {reason}; mend or remove it, or pass --on-bad-image skip") from error
        return reason


def data_files(root: Path, *patterns: str) -> list[Path]:
    """The files that match these patterns, sorted, without hidden ones.

    Raises:
        DataError: One is a pipe or a device: opening it would wait forever.
    """
    found = {
        path
        for pattern in patterns
        for path in root.glob(pattern)
        if not any(part.startswith(".") for part in path.relative_to(root).parts)
    }
    for path in found:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise DataError(f"{path} is not a regular file; remove or rename it")
    return sorted(found)


def check_numbered(files: Iterable[Path]) -> None:
    """Refuse a numbered set of files with a hole.

    ``train-00000-of-00003.parquet`` tells how many there are. Of ``train-0000.tar`` and the like all up to the
    highest must be there, from 0 or 1 on; a number that has no leading zero and is not 0 or 1 may be part of a name.

    Raises:
        DataError: Files are missing; the message names them.
    """
    sets: dict[tuple[Path, str, str | None, str], list[str]] = {}
    for path in files:
        match = re.fullmatch(r"(.*?)(\d+)(?:-of-(\d+)(?:-[0-9a-f]+)?)?(\.\w+)", path.name)
        if match is not None:
            stem, number, total, suffix = match.groups()
            sets.setdefault((path.parent, stem, total, suffix), []).append(number)
    for (folder, stem, total, suffix), numbers in sets.items():
        present = {int(number) for number in numbers}
        lowest = min(numbers, key=int)
        if total is None and min(present) > 1 and not lowest.startswith("0"):
            continue
        wanted = range(min(*present, 1), max(present) + 1) if total is None else range(int(total))
        absent = [f"{stem}{i:0{len(lowest)}}" for i in wanted if i not in present]
        if absent:
            ending = suffix if total is None else f"-of-{total}{suffix}"
            named = ", ".join(name + ending for name in absent[:3]) + (", ..." if len(absent) > 3 else "")
            raise DataError(
                f"{folder} lacks {named} ({len(absent)} of {len(wanted)} files of this set); "
                "add what is missing, or number the rest anew"
            )
