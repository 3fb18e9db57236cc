"""Mean intersection over union as evidence: pixels said and true of each class, image by image."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torchmetrics
from numpy.typing import NDArray
from torch import Tensor

from ..errors import StaticKeyError
from .task import Arrays, Metric

MEAN_IOU = Metric("miou", "mIoU")


@dataclass(frozen=True, eq=False)
class Overlap:
    """Evidence of a segmenter.

    Raises:
        StaticKeyError: The three differ in shape, or there is no image.
    """

    both: NDArray[Any]
    """Pixels that are of a class and were said to be, (N, num_classes)."""
    said: NDArray[Any]
    """Pixels said to be of a class, (N, num_classes)."""
    true: NDArray[Any]
    """Pixels of a class, (N, num_classes)."""

    def __post_init__(self) -> None:
        if self.both.ndim != 2 or not self.both.shape == self.said.shape == self.true.shape or not len(self.both):
            raise StaticKeyError(
                f"both {self.both.shape}, said {self.said.shape}, true {self.true.shape} must be (N, classes), N > 0"
            )

    @classmethod
    def of(cls, counts: NDArray[Any]) -> "Overlap":
        """From pixels by true class and the one said, (N, num_classes, num_classes)."""
        return cls(counts.diagonal(axis1=1, axis2=2), counts.sum(1), counts.sum(2))

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.both)

    def per_class(self, image_weights: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        """Intersection over union of each class in percent; NaN for one that is neither there nor said to be."""
        weights = np.ones(self.num_images) if image_weights is None else image_weights
        both, said, true = (weights @ counts for counts in (self.both, self.said, self.true))
        union = said + true - both
        share: NDArray[np.float64] = np.divide(100 * both, union, out=np.full(len(union), np.nan), where=union > 0)
        return share

    def value(self, image_weights: NDArray[np.float64] | None = None) -> float:
        """Mean over classes in percent, each image's pixels counted as often as its weight, (N,), says."""
        found = self.per_class(image_weights)
        known = found[~np.isnan(found)]
        return float(known.mean()) if len(known) else 0.0

    def arrays(self) -> Arrays:
        """The three by name."""
        return {"both": self.both, "said": self.said, "true": self.true}


class MeanIoU(torchmetrics.Metric):
    """Mean intersection over union over all pixels, for the learning curve; as ``Overlap.value``, between 0 and 1.

    Args:
        num_classes: Classes.
    """

    counts: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        zeros = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.add_state("counts", default=zeros, dist_reduce_fx="sum")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add pixels by true class and by the one said, (B, num_classes, num_classes); ``targets`` are not needed."""
        self.counts += outputs.sum(0)

    def compute(self) -> Tensor:
        """Mean over the classes that are there or said to be."""
        return torch.tensor(Overlap.of(self.counts[None].cpu().numpy()).value() / 100)
