"""Average precision as COCO defines it, for any weights of the images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data import run_length_tools
from ..errors import StaticKeyError
from .task import Arrays, Metric

BOX_AP = Metric("box_ap", "box AP")
THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""Overlaps from which a detection counts as right; AP is the mean over them."""
MOST_DETECTIONS = 100
"""Per image and class."""
AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
"""Ranges of the objects' areas in pixels, both ends included."""
_RECALLS = np.linspace(0.0, 1.0, 101)
_FIELDS = ("detections", "scores", "labels", "right", "ignored", "objects", "object_labels", "object_ignored")


@dataclass(frozen=True, eq=False)
class AveragePrecision:
    """What every detection was, image by image, so that AP can be taken for any weights of the images.

    R is the number of area ranges, T that of ``THRESHOLDS``. Detections of crowds, and unmatched ones of another
    area, are ignored.
    """

    detections: NDArray[Any]
    """How many each image has, (N,)."""
    scores: NDArray[Any]
    """Of all images' detections, (n,)."""
    labels: NDArray[Any]
    """Their classes, (n,)."""
    right: NDArray[Any]
    """Whether they found an object, (n, R, T)."""
    ignored: NDArray[Any]
    """Whether they do not count, (n, R, T)."""
    objects: NDArray[Any]
    """How many objects each image has, (N,)."""
    object_labels: NDArray[Any]
    """Their classes, (m,)."""
    object_ignored: NDArray[Any]
    """Whether they do not count, being crowds or of another area, (m, R)."""

    def __post_init__(self) -> None:
        of_images = len(self.detections) == len(self.objects) > 0
        of_detections = {len(x) for x in (self.scores, self.labels, self.right, self.ignored)}
        of_objects = {len(x) for x in (self.object_labels, self.object_ignored)}
        if not of_images or of_detections != {self.detections.sum()} or of_objects != {self.objects.sum()}:
            raise StaticKeyError("arrays of detections and objects have other lengths than their counts say")

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.detections)

    def value(self, image_weights: NDArray[np.float64] | None = None) -> float:
        """AP in percent, the mean over classes that occur and overlaps; 0 where no object counts."""
        found = self.by_class(image_weights)
        return 100 * float(np.mean(list(found.values()))) if found else 0.0

    def by_class(
        self,
        image_weights: NDArray[np.float64] | None = None,
        *,
        area: int = 0,
        thresholds: slice = slice(None),
    ) -> dict[int, float]:
        """AP in [0, 1] of every class that has objects.

        Args:
            image_weights: How often each image counts, (N,); default once.
            area: Which of the R ranges.
            thresholds: Which of ``THRESHOLDS``.
        """
        weights = np.ones(self.num_images) if image_weights is None else image_weights
        of_objects = np.repeat(weights, self.objects) * ~self.object_ignored[:, area]
        of_detections = np.repeat(weights, self.detections)
        found = {}
        for label, order in self._order.items():
            total = of_objects[self.object_labels == label].sum()
            if total <= 0:
                continue
            counted = of_detections[order, None] * ~self.ignored[order, area, thresholds]
            right = np.cumsum(counted * self.right[order, area, thresholds], axis=0)
            every = np.cumsum(counted, axis=0)
            recall, precision = right / total, right / (every + np.spacing(1))
            precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
            found[label] = float(
                np.mean([_interpolated(recall[:, t], precision[:, t]) for t in range(recall.shape[1])])
            )
        return found

    def arrays(self) -> Arrays:
        """All arrays by name."""
        return {name: getattr(self, name) for name in _FIELDS}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> "AveragePrecision":
        """From ``arrays``; raises KeyError where one is missing."""
        return cls(**{name: arrays[name] for name in _FIELDS})

    @cached_property
    def _order(self) -> dict[int, NDArray[np.intp]]:
        """Detections of each class that objects are of, the surest first, equally sure ones as the images come."""
        by_score = np.argsort(-self.scores, kind="stable")
        return {int(k): by_score[self.labels[by_score] == k] for k in np.unique(self.object_labels)}


def match_boxes(
    found: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]], *, areas: Sequence[str] = ("all",)
) -> AveragePrecision:
    """Hold the boxes found on images against those marked.

    Args:
        found: Of each image ``boxes`` (n, 4), ``scores`` (n,) and ``labels`` (n,).
        targets: Of each image ``boxes`` (m, 4), ``labels`` (m,), ``crowd`` (m,), and ``masks``, whose areas are the
            objects' where they are given.
        areas: Names in ``AREAS``.
    """
    return _match(found, targets, areas, lambda own: _xywh(own["boxes"]))


def match_masks(
    found: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]], *, areas: Sequence[str] = ("all",)
) -> AveragePrecision:
    """As ``match_boxes``, by the overlap of ``masks``, which both have as run lengths."""
    return _match(found, targets, areas, lambda own: list(own["masks"]))


def _match(found: Any, targets: Any, areas: Sequence[str], shapes_of: Any) -> AveragePrecision:
    ranges = np.array([AREAS[name] for name in areas])
    images = [_match_image(own, real, ranges, shapes_of) for own, real in zip(found, targets, strict=True)]
    columns = [np.concatenate(column) for column in zip(*images, strict=True)]
    return AveragePrecision(*columns)


def _match_image(found: Any, real: Any, ranges: NDArray[np.float64], shapes_of: Any) -> tuple[NDArray[Any], ...]:
    """The fields of one image; detections come out class by class, the surest first."""
    scores, labels = np.asarray(found["scores"], np.float64), np.asarray(found["labels"], np.int64)
    real_labels, crowd = np.asarray(real["labels"], np.int64), np.asarray(real["crowd"], bool)
    shapes, real_shapes = shapes_of(found), shapes_of(real)
    size, real_size = _areas(shapes), _areas(list(real["masks"]) if "masks" in real else real_shapes)
    low, high = ranges[:, 0], ranges[:, 1]
    outside = (size[:, None] < low) | (size[:, None] > high)
    real_ignored = crowd[:, None] | (real_size[:, None] < low) | (real_size[:, None] > high)
    order, right, ignored = [], [], []
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        mine = mine[np.argsort(-scores[mine], kind="stable")][:MOST_DETECTIONS]
        theirs = np.flatnonzero(real_labels == label)
        overlaps = np.zeros((len(mine), 0))
        if len(theirs):
            flags = crowd[theirs].astype(np.uint8).tolist()
            overlaps = np.asarray(run_length_tools().iou(_taken(shapes, mine), _taken(real_shapes, theirs), flags))
        hit, free = _assign(overlaps, crowd[theirs], real_ignored[theirs].T)
        order.append(mine)
        right.append(hit)
        ignored.append(free | (~hit & outside[mine][:, :, None]))
    empty = np.zeros((0, len(ranges), len(THRESHOLDS)), bool)
    chosen = np.concatenate([np.zeros(0, np.int64), *order])
    return (
        np.array([len(chosen)]),
        scores[chosen],
        labels[chosen],
        np.concatenate([empty, *right]),
        np.concatenate([empty, *ignored]),
        np.array([len(real_labels)]),
        real_labels,
        real_ignored,
    )


def _assign(
    overlaps: NDArray[np.float64], crowd: NDArray[np.bool_], ignored: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Give each detection, the surest first, the object it overlaps most of those still free; crowds stay free.

    Args:
        overlaps: (n, m).
        crowd: (m,).
        ignored: By area range, (R, m); such objects are only taken where no other is left.

    Returns:
        Whether each detection has an object, and whether that is an ignored one, both (n, R, T).
    """
    shape = (len(overlaps), len(ignored), len(THRESHOLDS))
    hit, free = np.zeros(shape, bool), np.zeros(shape, bool)
    taken = np.zeros((*shape[1:], len(crowd)), bool)
    backwards = np.arange(len(crowd))[::-1]  # of equal overlaps the last wins
    for d in np.flatnonzero(overlaps.max(1, initial=0.0) >= THRESHOLDS[0]):
        reached = overlaps[d] >= np.minimum(THRESHOLDS, 1 - 1e-10)[:, None]
        open_ = reached & (~taken | crowd)
        proper = open_ & ~ignored[:, None, :]
        has_proper = proper.any(-1)
        choice = np.where(has_proper[..., None], proper, open_)
        some = choice.any(-1)
        best = backwards[np.where(choice, overlaps[d], -1.0)[..., ::-1].argmax(-1)]
        r, t = np.nonzero(some)
        taken[r, t, best[r, t]] = True
        hit[d], free[d] = some, some & ~has_proper
    return hit, free


def _interpolated(recall: NDArray[np.float64], precision: NDArray[np.float64]) -> float:
    """The mean of the precision at 101 recalls."""
    places = np.searchsorted(recall, _RECALLS, side="left")
    return float(np.append(precision, 0.0)[places].mean())


def _xywh(boxes: Any) -> NDArray[np.float64]:
    corners = np.asarray(boxes, np.float64).reshape(-1, 4)
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)


def _areas(shapes: Any) -> NDArray[np.float64]:
    if isinstance(shapes, np.ndarray):
        return np.asarray(shapes[:, 2] * shapes[:, 3])
    return np.asarray(run_length_tools().area(shapes), np.float64) if shapes else np.zeros(0)


def _taken(shapes: Any, places: NDArray[np.intp]) -> Any:
    return shapes[places] if isinstance(shapes, np.ndarray) else [shapes[i] for i in places]
