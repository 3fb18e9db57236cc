"""Folders of images and of masks that hold the index of a class for every pixel."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import DataError
from .annotations import IGNORE_INDEX, MapPictures, SegmentationData
from .folders import image_files
from .layout import TEST_NAMES, TRAIN_NAMES, BadSamples, image_size, inside, listed_names, read_json, read_picture
from .pixels import UNREADABLE, open_image

Palette = tuple[tuple[int, int, int], ...]
VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_UNKNOWN = -1


@dataclass(frozen=True)
class MaskClasses:
    """Which indices of masks stand for which classes."""

    names: tuple[str, ...]
    ignored: frozenset[int] = frozenset({IGNORE_INDEX})
    """Indices that are of no class."""
    palette: Palette | None = None

    def table(self) -> NDArray[np.int16]:
        """Class of each index, (256,); -1 for one that no class has. Indices not ignored are classes, in order."""
        table = np.full(256, _UNKNOWN, np.int16)
        used = [index for index in range(256) if index not in self.ignored][: len(self.names)]
        table[used] = np.arange(len(used))
        table[list(self.ignored)] = IGNORE_INDEX
        return table


class MaskFiles(MapPictures):
    """Images and masks in files of their own.

    Args:
        root: Folder of the data set.
        images: Files of the images.
        masks: Those of their masks.
        table: Class of each index, as ``MaskClasses`` gives it.
    """

    def __init__(self, root: Path, images: Sequence[Path], masks: Sequence[Path], table: NDArray[np.int16]) -> None:
        self.root, self.images, self.masks, self.table = root, images, masks, table

    def __len__(self) -> int:
        return len(self.images)

    def open(self, i: int) -> Image.Image:
        """The image in its file."""
        return read_picture(self.images[i])

    def describe(self, i: int) -> str:
        """The path of its file."""
        return str(self.images[i])

    def key(self, i: int) -> str:
        """Its name, the size of its file, and a hash of its mask's file."""
        image = self.images[i]
        marks = hashlib.sha256(self.masks[i].read_bytes()).hexdigest()
        return f"{image.relative_to(self.root).as_posix()} {image.stat().st_size} {marks}"

    def class_map(self, i: int) -> NDArray[np.uint8]:
        """The mask in its file.

        Raises:
            DataError: It cannot be read, holds colours, or an index that no class has.
        """
        path = self.masks[i]
        indices = read_mask(path)
        classes = self.table[indices]
        if classes.min() == _UNKNOWN:
            index = indices[classes == _UNKNOWN].min()
            names = len(np.unique(self.table[(self.table != _UNKNOWN) & (self.table != IGNORE_INDEX)]))
            raise DataError(
                f"mask {path} holds index {index}, which none of the {names} classes has; mend it, or name its class "
                "or list it under 'ignore' in classes.json"
            )
        return classes.astype(np.uint8)


def read_mask(path: Path) -> NDArray[np.uint8]:
    """The indices in a mask, (H, W).

    Raises:
        DataError: It cannot be read, or holds other than indices of 8 bits.
    """
    try:
        with open_image(path) as image:
            _check_mode(image, path)
            return np.asarray(image).astype(np.uint8)
    except DataError:
        raise
    except UNREADABLE as error:
        raise DataError(f"cannot read mask {path}: {error}; mend it, or remove it and its image") from error


def _check_mode(mask: Image.Image, path: Path) -> None:
    if mask.mode not in ("L", "P", "1"):
        raise DataError(
            f"mask {path} is of mode {mask.mode}, which holds no indices of classes; save the index of each pixel's "
            "class as 8-bit grey or palette PNG"
        )


def mask_folder(root: Path) -> Path | None:
    """The folder of masks in a data set of this layout; None where it is of another."""
    folders = [root / "masks", root / "annotations"]
    if (root / "images").is_dir():
        return next((f for f in folders if any((f / name).is_dir() for name in TRAIN_NAMES + TEST_NAMES)), None)
    return None


def mask_folder_data(data: str, root: Path, masks: Path, bad: BadSamples) -> SegmentationData:
    """Images under ``images/SPLIT`` with masks of the same name under ``masks/SPLIT`` or ``annotations/SPLIT``."""
    pairs = []
    for names in (TRAIN_NAMES, TEST_NAMES):
        split = next((name for name in names if (root / "images" / name).is_dir()), None)
        if split is None:
            raise DataError(
                f"{root / 'images' / names[0]} is missing; a folder of masks has images/train and images/val"
            )
        pairs.append(_pairs(root / "images" / split, masks / split, bad))
    return _data(data, root, pairs, read_classes(root), bad)


def is_voc_masks(root: Path) -> bool:
    """Whether a folder has the layout of Pascal VOC, with masks."""
    return (root / "SegmentationClass").is_dir()


def voc_mask_data(data: str, root: Path, bad: BadSamples) -> SegmentationData:
    """``JPEGImages`` and ``SegmentationClass``, with lists of names in ``ImageSets/Segmentation``."""
    pairs = []
    for names in (("train",), TEST_NAMES):
        path, listed = listed_names(root / "ImageSets" / "Segmentation", names)
        images, masks = [], []
        for name in listed:
            with bad.sample():
                image = inside(root / "JPEGImages", f"{name}.jpg", str(path))
                mask = root / "SegmentationClass" / f"{name}.png"
                _check_pair(image, mask)
                images.append(image)
                masks.append(mask)
        pairs.append((images, masks))
    own = read_classes(root)
    return _data(data, root, pairs, MaskClasses(VOC_CLASSES) if own is None else own, bad)


def read_classes(root: Path) -> MaskClasses | None:
    """What ``classes.json`` says, where it is.

    It is a list of names, or a mapping with ``classes``, the names; ``colors``, a colour [r, g, b] for each; and
    ``ignore`` (or ``ignore_index``), the index or indices that are of no class, beside 255, which never is of one.
    The names are those of the other indices, in order: ``"ignore": [0]`` makes the first name that of index 1.

    Raises:
        DataError: It says something else.
    """
    path = root / "classes.json"
    if not path.exists():
        return None
    said = read_json(path)
    said = {"classes": said} if isinstance(said, list) else said
    known = {"classes", "colors", "ignore", "ignore_index"}
    if not isinstance(said, Mapping) or "classes" not in said or set(said) - known:
        raise DataError(f"{path} must be a list of names, or have 'classes' and, at most, {', '.join(sorted(known))}")
    names, ignored = said["classes"], said.get("ignore", said.get("ignore_index", []))
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"{path}: 'classes' must be a list of names")
    ignored = ignored if isinstance(ignored, list) else [ignored]
    if not all(_is_byte(index) for index in ignored):
        raise DataError(f"{path}: 'ignore' is {ignored}; it must list indices from 0 to 255")
    ignored = frozenset({*ignored, IGNORE_INDEX})
    if len(names) > 256 - len(ignored):
        raise DataError(f"{path} names {len(names)} classes; 8-bit masks tell {256 - len(ignored)} apart")
    return MaskClasses(tuple(names), ignored, _palette(path, said.get("colors"), len(names)))


def _palette(path: Path, colors: Any, count: int) -> Palette | None:
    if colors is None:
        return None
    if not isinstance(colors, list) or len(colors) != count or not all(_is_color(color) for color in colors):
        raise DataError(f"{path}: 'colors' must list [r, g, b], each from 0 to 255, for every class")
    return tuple((r, g, b) for r, g, b in colors)


def _is_color(color: Any) -> bool:
    return isinstance(color, list) and len(color) == 3 and all(_is_byte(level) for level in color)


def _is_byte(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255


def _pairs(images: Path, masks: Path, bad: BadSamples) -> tuple[list[Path], list[Path]]:
    found: tuple[list[Path], list[Path]] = ([], [])
    seen: dict[Path, Path] = {}
    for image in image_files(images):
        with bad.sample():
            mask = (masks / image.relative_to(images)).with_suffix(".png")
            if mask in seen:
                raise DataError(f"{image} and {seen[mask].name} share the mask {mask}")
            seen[mask] = image
            _check_pair(image, mask)
            found[0].append(image)
            found[1].append(mask)
    return found


def _check_pair(image: Path, mask: Path) -> None:
    for path, what in ((image, "image"), (mask, f"mask of {image}")):
        if not path.is_file():
            raise DataError(f"{path}, the {what}, is missing")
    sizes = image_size(image), image_size(mask, _check_mode)
    if sizes[0] != sizes[1]:
        shown = [f"{width}x{height}" for width, height in sizes]
        raise DataError(f"{image} is {shown[0]} pixels, its mask {mask} {shown[1]}")


def _data(
    data: str,
    root: Path,
    pairs: Sequence[tuple[list[Path], list[Path]]],
    classes: MaskClasses | None,
    bad: BadSamples,
) -> SegmentationData:
    if classes is None:
        indices = set[int]().union(*(np.unique(read_mask(mask)).tolist() for mask in pairs[0][1])) - {IGNORE_INDEX}
        classes = MaskClasses(tuple(str(index) for index in range(max(indices, default=0) + 1)))
    table = classes.table()
    train, test = (MaskFiles(root, images, masks, table) for images, masks in pairs)
    return SegmentationData(data, classes.names, train, test, palette=classes.palette, skipped=tuple(bad.skipped))
