"""Evidence of top-1 accuracy."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Accuracy:
    """The class said of each image and the true one, (N,) each."""

    predicted: NDArray[Any]
    truth: NDArray[Any]

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.truth)

    def value(self, image_weights: NDArray[np.float64] | None = None) -> float:
        """Top-1 accuracy in percent."""
        return float(100 * np.average(self.predicted == self.truth, weights=image_weights))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """``predicted`` and ``truth``."""
        return {"predicted": self.predicted, "truth": self.truth}
