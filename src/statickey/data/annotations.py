"""Images with objects or a map of classes marked on them: what readers of dense data give."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

OnBadSample = Literal["fail", "skip"]
IGNORE_INDEX = 255
"""Pixels of a class map that are of no class: not learned from, not scored."""


@dataclass(frozen=True)
class Objects:
    """The objects marked on one image."""

    boxes: Tensor
    """Corners (x1, y1, x2, y2) in pixels, inside the image and of positive area, (n, 4) in float32."""
    labels: Tensor
    """Places in the data set's ``class_names``, (n,) in int64."""
    crowd: Tensor
    """Whether a mark stands for a group, which is neither learned from nor scored as one object, (n,) bool."""
    masks: tuple[dict[str, Any], ...] | None = None
    """Run lengths of each object's mask, ``{"size": [H, W], "counts": bytes}`` as COCO has them; None where the data
    have boxes alone."""

    def __len__(self) -> int:
        return len(self.labels)

    def mask_tensor(self) -> Tensor:
        """The masks as pixels, (n, H, W) bool; only for data with masks and at least one object."""
        decode = run_length_tools().decode
        return torch.from_numpy(np.stack([decode(run_lengths) for run_lengths in self.masks or ()])).bool()


def run_length_tools() -> Any:
    """The functions of faster-coco-eval on run lengths of masks, imported when needed: the package is an extra."""
    from faster_coco_eval.core import mask

    return mask


class Pictures(ABC):
    """The images of one split: picklable, so that spawned workers can read them."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def open(self, i: int) -> Image.Image:
        """Image ``i`` in RGB; raises DataError, which names file and reason, where it cannot be read."""

    @abstractmethod
    def describe(self, i: int) -> str:
        """Where image ``i`` is, for messages: its file, and its id where it has one."""

    @abstractmethod
    def key(self, i: int) -> str:
        """What identifies image ``i`` and its marks in a fingerprint; no pixel is read."""


class ObjectPictures(Pictures):
    """Images with objects."""

    @abstractmethod
    def objects(self, i: int) -> Objects:
        """What is marked on image ``i``."""

    @abstractmethod
    def image_id(self, i: int) -> int | str:
        """What the data set calls image ``i``, for result files."""


class MapPictures(Pictures):
    """Images with a class for every pixel."""

    @abstractmethod
    def class_map(self, i: int) -> NDArray[np.uint8]:
        """Class of every pixel of image ``i``, ``IGNORE_INDEX`` where none, (H, W)."""


class _Part(Pictures):
    """Some images of others."""

    pictures: Pictures

    def __init__(self, indices: Sequence[int]) -> None:
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def open(self, i: int) -> Image.Image:
        return self.pictures.open(self.indices[i])

    def describe(self, i: int) -> str:
        return self.pictures.describe(self.indices[i])

    def key(self, i: int) -> str:
        return self.pictures.key(self.indices[i])


class ObjectPart(_Part, ObjectPictures):
    """Some images of others, with their objects."""

    def __init__(self, pictures: ObjectPictures, indices: Sequence[int]) -> None:
        super().__init__(indices)
        self.pictures: ObjectPictures = pictures

    def objects(self, i: int) -> Objects:
        """As in the whole."""
        return self.pictures.objects(self.indices[i])

    def image_id(self, i: int) -> int | str:
        """As in the whole."""
        return self.pictures.image_id(self.indices[i])


class MapPart(_Part, MapPictures):
    """Some images of others, with their maps of classes."""

    def __init__(self, pictures: MapPictures, indices: Sequence[int]) -> None:
        super().__init__(indices)
        self.pictures: MapPictures = pictures

    def class_map(self, i: int) -> NDArray[np.uint8]:
        """As in the whole."""
        return self.pictures.class_map(self.indices[i])


@dataclass(frozen=True)
class AnnotatedData:
    """What both kinds of dense data have."""

    name: str
    class_names: tuple[str, ...]
    skipped: tuple[str, ...] = field(default=(), kw_only=True)
    """Samples left out, with reasons."""
    flip: bool = field(default=True, kw_only=True)
    """Whether an image may be mirrored and still show its classes."""
    in_chans: int = field(default=3, init=False)

    def _digest(self, parts: Sequence[Pictures]) -> str:
        digest = hashlib.sha256(repr(self.class_names).encode(errors="surrogatepass"))
        for part in parts:
            digest.update(str(len(part)).encode())
            for i in range(len(part)):
                digest.update(part.key(i).encode(errors="surrogatepass"))
        return digest.hexdigest()


@dataclass(frozen=True)
class DetectionData(AnnotatedData):
    """Images with boxes, and masks where they have them."""

    train: ObjectPictures
    test: ObjectPictures
    has_masks: bool
    category_ids: tuple[int, ...]
    """What the data set calls each of ``class_names`` in result files; numbers may have gaps."""

    def fingerprint(self) -> str:
        """A hash of classes, names of images and all marks."""
        return self._digest([self.train, self.test])


@dataclass(frozen=True)
class SegmentationData(AnnotatedData):
    """Images with a map of classes."""

    train: MapPictures
    test: MapPictures
    palette: tuple[tuple[int, int, int], ...] | None = None
    """A colour for each of ``class_names``, where the data set has its own."""

    def fingerprint(self) -> str:
        """A hash of classes, names and sizes of images, and bytes of maps; of all pixels where there are no files."""
        return self._digest([self.train, self.test])
