"""What a task is: all that training, scoring and comparing must know of what is learned."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Metric:
    """The number a task is judged by, and how tables and figures print it."""

    name: str
    """In files: ``accuracy``, and from it ``ema_accuracy`` and ``holdout_accuracy``."""
    label: str
    """In tables and figures."""
    unit: str = "%"
    higher_is_better: bool = True

    def text(self, value: float) -> str:
        """The number with its unit."""
        return f"{value:.2f} {self.unit}".rstrip()


class Evidence(Protocol):
    """What a score is made of, image by image, so that it can be taken for any weights of the images."""

    @property
    def num_images(self) -> int:
        """N."""

    def value(self, image_weights: NDArray[np.float64] | None = None) -> float:
        """The task's metric over the images, each counted as often as its weight, (N,), says; default once."""

    def arrays(self) -> Arrays:
        """All of it as arrays, from which the task makes it again."""
