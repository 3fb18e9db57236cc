"""Objects marked on images in files: checked as they are collected, kept in compact arrays."""

import hashlib
import math
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..errors import DataError
from .annotations import ObjectPictures, Objects, run_length_tools
from .layout import read_picture

_ROUNDING = 2.0
"""Pixels by which a box or polygon may leave its image."""
_LARGEST = 2 * 89478485
"""Pixels of the largest image that Pillow opens."""


class Mark(NamedTuple):
    """One object as a data set has it."""

    name: str
    """What it is called in messages."""
    box: Sequence[float]
    """Corners (x1, y1, x2, y2) in pixels."""
    label: int
    crowd: bool = False
    mask: Any = None
    """Polygons, lists of x and y in turn, or run lengths as COCO has them; None for none."""


class ObjectFiles(ObjectPictures):
    """Images in files of their own and the objects on them.

    Args:
        root: Folder of the images.
        has_masks: Whether to keep masks; every object that is no crowd must have one then. A crowd without one is its
            box.
    """

    def __init__(self, root: Path, has_masks: bool) -> None:
        self.root, self.has_masks = root, has_masks
        self.names: list[str] = []
        self.ids: list[int | str] = []
        self._sizes, self._ends = array("i"), array("q", [0])
        self._boxes, self._labels, self._crowd = array("f"), array("i"), array("b")
        self._masks, self._mask_ends, self._is_polygon = bytearray(), array("q", [0]), array("b")

    def add(self, file: Path, image_id: int | str, size: tuple[int, int], marks: Iterable[Mark]) -> None:
        """Take in an image, its size (width, height) and its objects.

        Raises:
            DataError: Something is wrong with one of them; nothing of the image is kept then.
        """
        if not (min(size) > 0 and math.prod(size) <= _LARGEST):
            raise DataError(
                f"{file} is said to have {size[0]}x{size[1]} pixels, which no image has that can be opened"
            )
        checked = [_checked(mark, size, self.has_masks) for mark in marks]
        for mark, box, (is_polygon, mask) in checked:
            self._boxes.extend(box)
            self._labels.append(mark.label)
            self._crowd.append(mark.crowd)
            self._masks += mask
            self._mask_ends.append(len(self._masks))
            self._is_polygon.append(is_polygon)
        self.names.append(file.relative_to(self.root).as_posix())
        self.ids.append(image_id)
        self._sizes.extend(size)
        self._ends.append(len(self._labels))

    def __len__(self) -> int:
        return len(self.names)

    def open(self, i: int) -> Image.Image:
        """The image in its file.

        Raises:
            DataError: It cannot be read, or is of another size than its marks are for.
        """
        path = self.root / self.names[i]
        image = read_picture(path)
        size = self._size(i)
        if image.size != size:
            raise DataError(
                f"{self.describe(i)} is {image.width}x{image.height} pixels, its marks are for {size[0]}x{size[1]}"
            )
        return image

    def describe(self, i: int) -> str:
        """The path of its file, and its number where it has one."""
        number = f" (image {self.ids[i]})" if isinstance(self.ids[i], int) else ""
        return f"{self.root / self.names[i]}{number}"

    def key(self, i: int) -> str:
        """Its name and size, and a hash of its marks."""
        first, end = self._ends[i], self._ends[i + 1]
        digest = hashlib.sha256(self._boxes[4 * first : 4 * end].tobytes())
        digest.update(self._labels[first:end].tobytes() + self._crowd[first:end].tobytes())
        for k in range(first, end):
            digest.update(self._mask_bytes(k) + b"\0")
        return f"{self.names[i]} {self._size(i)} {digest.hexdigest()}"

    def image_id(self, i: int) -> int | str:
        """Its number in the data set, or the name of its file where images have no numbers."""
        return self.ids[i]

    def objects(self, i: int) -> Objects:
        """What is marked on it."""
        first, end = self._ends[i], self._ends[i + 1]
        boxes = torch.tensor(self._boxes[4 * first : 4 * end], dtype=torch.float32).view(-1, 4)
        labels = torch.tensor(self._labels[first:end], dtype=torch.int64)
        crowd = torch.tensor(self._crowd[first:end], dtype=torch.bool)
        masks = tuple(self._run_lengths(k, self._size(i)) for k in range(first, end)) if self.has_masks else None
        return Objects(boxes, labels, crowd, masks)

    def _size(self, i: int) -> tuple[int, int]:
        return self._sizes[2 * i], self._sizes[2 * i + 1]

    def _mask_bytes(self, k: int) -> bytes:
        return bytes(self._masks[self._mask_ends[k] : self._mask_ends[k + 1]])

    def _run_lengths(self, k: int, size: tuple[int, int]) -> dict[str, Any]:
        width, height = size
        if not self._is_polygon[k]:
            return {"size": [height, width], "counts": self._mask_bytes(k)}
        mask = run_length_tools()

        run_lengths: dict[str, Any] = mask.segmToRle(_unpacked(self._mask_bytes(k)), width, height)
        return run_lengths


def _clipped(box: Sequence[float], size: tuple[int, int], name: str) -> Sequence[float]:
    """Corners of a box inside an image of this width and height, in float32.

    Raises:
        DataError: It is not finite, leaves the image by over 2 pixels, or has no area.
    """
    limits = (*size, *size)
    clipped = array("f", [min(max(corner, 0.0), limit) for corner, limit in zip(box, limits, strict=True)])
    problem = None
    if not all(map(math.isfinite, box)):
        problem = ", which is not finite"
    elif not all(-_ROUNDING <= corner <= limit + _ROUNDING for corner, limit in zip(box, limits, strict=True)):
        problem = f", outside its image of {size[0]}x{size[1]} pixels"
    elif not (clipped[2] > clipped[0] and clipped[3] > clipped[1]):
        problem = " of no area"
    if problem is not None:
        raise DataError(f"{name} has the box [{', '.join(f'{corner:.6g}' for corner in box)}]{problem}")
    return clipped


def _checked(mark: Mark, size: tuple[int, int], has_masks: bool) -> tuple[Mark, Sequence[float], tuple[bool, bytes]]:
    box = _clipped(mark.box, size, mark.name)
    if not has_masks:
        return mark, box, (False, b"")
    if mark.mask:
        return mark, box, _packed_mask(mark.mask, size, mark.name)
    if not mark.crowd:
        raise DataError(f"{mark.name} has no mask, but others have; mark a mask on all objects or on none")
    x1, y1, x2, y2 = box
    return mark, box, _packed_mask([[x1, y1, x2, y1, x2, y2, x1, y2]], size, mark.name)


def _packed_mask(mask: Any, size: tuple[int, int], name: str) -> tuple[bool, bytes]:
    """Whether a mask is of polygons, and its bytes."""
    try:
        if isinstance(mask, dict):
            return False, _run_length_bytes(mask, size, name)
        return True, _polygon_bytes(mask, size, name)
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{name} has a mask that is neither polygons nor run lengths ({error!r})") from error


def _polygon_bytes(polygons: Any, size: tuple[int, int], name: str) -> bytes:
    packed = array("f")
    for polygon in polygons:
        points = np.asarray(polygon, np.float64)
        if points.ndim != 1 or len(points) < 6 or len(points) % 2:
            raise DataError(f"{name} has a polygon of {points.size} numbers; x and y of 3 points or more are needed")
        xs, ys = points[::2], points[1::2]
        if not (points.min() >= -_ROUNDING and xs.max() <= size[0] + _ROUNDING and ys.max() <= size[1] + _ROUNDING):
            raise DataError(f"{name} has a polygon outside its image of {size[0]}x{size[1]} pixels")
        packed.append(len(points))
        packed.frombytes(points.reshape(-1, 2).clip(0, size).astype(np.float32).tobytes())
    return packed.tobytes()


def _unpacked(packed: bytes) -> list[list[float]]:
    values = array("f", packed)
    polygons, first = [], 0
    while first < len(values):
        end = first + 1 + int(values[first])
        polygons.append(values[first + 1 : end].tolist())
        first = end
    return polygons


def _run_length_bytes(mask: dict[str, Any], size: tuple[int, int], name: str) -> bytes:
    run_lengths = run_length_tools()

    width, height = size
    if list(mask["size"]) != [height, width]:
        raise DataError(f"{name} has a mask of size {mask['size']}; its image is {height} high and {width} wide")
    counts = mask["counts"]
    compressed = isinstance(counts, str | bytes)
    counts_bytes = counts.encode("ascii") if isinstance(counts, str) else counts
    runs = _decompressed(counts_bytes) if compressed else np.asarray(counts, np.int64)
    if runs.ndim != 1 or not ((runs >= 0) & (runs <= width * height)).all() or runs.sum() != width * height:
        raise DataError(f"{name} has run lengths that do not add up to its image of {width}x{height} pixels")
    if compressed:
        return bytes(counts_bytes)
    return bytes(run_lengths.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)["counts"])


def _decompressed(counts: bytes) -> NDArray[np.int64]:
    """Run lengths of COCO's compressed text, whose reader trusts it; a negative one where the text is torn.

    Each character holds 5 bits of a number and whether more follow; numbers from the fourth on are differences to the
    one before the last.
    """
    codes = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    last = np.flatnonzero((codes & 0x20) == 0)
    if (codes < 0).any() or (codes > 63).any() or not len(codes) or last[-1:].tolist() != [len(codes) - 1]:
        return np.array([-1])
    starts = np.concatenate([[0], last[:-1] + 1])
    places = np.arange(len(codes)) - np.repeat(starts, last - starts + 1)
    if places.max() > 6:  # more than 35 bits
        return np.array([-1])
    values = np.add.reduceat((codes & 0x1F) << (5 * places), starts)
    values -= np.where(codes[last] & 0x10, np.int64(1) << (5 * (places[last] + 1)), 0)
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return values
