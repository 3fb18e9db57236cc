"""What readers of marked images share: safe names of files, names of splits, and samples left out."""

import json
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from PIL import Image

from ..errors import DataError
from .annotations import OnBadSample
from .pixels import UNREADABLE, open_image, to_mode

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("val", "validation", "test")


class BadSamples:
    """What happens to samples that cannot be used: the first is refused, or all are left out and remembered.

    Args:
        on_bad_sample: Which of the two.
    """

    def __init__(self, on_bad_sample: OnBadSample) -> None:
        self.on_bad_sample = on_bad_sample
        self.skipped: list[str] = []

    @contextmanager
    def sample(self) -> Iterator[None]:
        """Reads one sample; a DataError within it concerns this sample alone."""
        try:
            yield
        except DataError as error:
            if self.on_bad_sample == "fail":
                raise DataError(f"{error}; mend or remove it, or pass --on-bad-sample skip") from error
            self.skipped.append(str(error))


def inside(root: Path, name: Any, where: str) -> Path:
    """A file within a data set by the name that the data set gives it.

    Raises:
        DataError: It is no name of a file, absolute, or climbs out of the folder: data made by others may not reach
            files elsewhere.
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise DataError(f"{where} names the file {reprlib.repr(name)}, which is no name of a file")
    windows = PureWindowsPath(name)
    if PurePosixPath(name).is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        raise DataError(f"{where} names the file {name!r}, which is outside {root}; name files below that folder")
    return root / name


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        DataError: It cannot be read, or is torn.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {path}: {error}; mend it") from error


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        DataError: It cannot be read, or is not UTF-8.
    """
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def listed_names(folder: Path, names: Sequence[str]) -> tuple[Path, list[str]]:
    """The first of some lists of samples that is in a folder, ``NAME.txt``, and what it lists, one a line.

    Raises:
        DataError: None is there, or it lists a sample twice.
    """
    paths = [folder / f"{name}.txt" for name in names]
    path = next((each for each in paths if each.is_file()), paths[0])
    listed = [line.strip() for line in read_lines(path)]
    twice = [name for name, count in Counter(listed).items() if count > 1]
    if twice:
        raise DataError(f"{path} lists {twice[0]!r} twice; remove one")
    return path, listed


def read_picture(path: Path) -> Image.Image:
    """An image in RGB.

    Raises:
        DataError: It cannot be read.
    """
    try:
        with open_image(path) as image:
            return to_mode(image, "RGB")
    except UNREADABLE as error:
        raise DataError(
            f"cannot read image {path}: {error}; mend or remove it, or pass --on-bad-sample skip"
        ) from error


def image_size(path: Path, check: Callable[[Image.Image, Path], None] | None = None) -> tuple[int, int]:
    """Width and height of an image in pixels, from its header, which ``check`` may refuse.

    Raises:
        DataError: It cannot be read.
    """
    try:
        with open_image(path) as image:
            if check is not None:
                check(image, path)
            return image.size
    except DataError:
        raise
    except UNREADABLE as error:
        raise DataError(f"cannot read image {path}: {error}") from error
