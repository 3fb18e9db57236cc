"""Accuracy as evidence: which class each image was taken for."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import StaticKeyError
from .task import Arrays, Metric

ACCURACY = Metric("accuracy", "accuracy")


@dataclass(frozen=True, eq=False)
class Accuracy:
    """Evidence of a classifier.

    Raises:
        StaticKeyError: The two differ in shape, or there is no image.
    """

    predicted: NDArray[Any]
    """Class that was predicted, (N,)."""
    truth: NDArray[Any]
    """Class of the image, (N,)."""

    def __post_init__(self) -> None:
        if self.predicted.ndim != 1 or self.predicted.shape != self.truth.shape or not len(self.truth):
            raise StaticKeyError(
                f"predicted {self.predicted.shape} and truth {self.truth.shape} must both be (N,), N > 0"
            )

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.truth)

    def value(self, image_weights: NDArray[np.float64] | None = None) -> float:
        """Accuracy in percent, each image counted as often as its weight, (N,), says; default once."""
        if image_weights is None:
            return float(100 * self._right.mean())
        return float(100 * (image_weights @ self._right) / image_weights.sum())

    def arrays(self) -> Arrays:
        """Both arrays by name."""
        return {"predicted": self.predicted, "truth": self.truth}

    @cached_property
    def _right(self) -> NDArray[np.float64]:
        return np.asarray(self.predicted == self.truth, dtype=np.float64)
