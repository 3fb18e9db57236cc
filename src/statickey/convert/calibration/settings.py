"""What a user asks of a calibration."""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from ..._checks import check_not_negative, check_positive
from ...errors import StaticKeyError
from ...layers import LogitBias
from .fits import Fit
from .reading import MIN_IMAGES

Criterion = Literal["change", "kl", "output"]
"""By which heads are ranked: change of the model's output when a head is converted alone, or an error of its own."""


@dataclass(frozen=True)
class Calibration:
    """Images, and how ``convert`` makes keys of them.

    With none of ``fraction``, ``heads`` and ``max_drop`` all heads of the chosen layers become static. A quarter of
    the images is kept back from every fit, and all errors and changes are measured on it.

    Args:
        images: A loader of batches (B, C, H, W), normalised as the model wants them, alone or first in a tuple, or as
            ``"pixel_values"`` of a mapping. It is read once.
        num_images: How many are taken, and held in memory.
        fit: What a head's static map is made near to: its distribution (``"kl"``), its logits (``"lstsq"``) or keys
            (``"mean"``). ``"constant"`` is the control: the mean map, whatever the queries.
        bias: What is added to logits: nothing, a number for each ``"key"``, or a ``"map"``, for each query's and
            key's place. ``"mean"`` takes none, ``"constant"`` a map.
        fraction: Share of the heads of the chosen layers, and of those static already, that are static in the end;
            those with the smallest error.
        heads: By layer, which heads become static.
        max_drop: The largest set of heads that lowers the metric by no more than this, or changes the output by no
            more than this share of its size, is found by bisection.
        metric: What ``max_drop`` is of: a number for a model, the higher the better.
        criterion: By which heads are ranked.
        seed: Of the shuffled keys among the controls.

    Raises:
        StaticKeyError: A value is out of range, or two ways to choose heads are given.
    """

    images: Any
    num_images: int = 512
    fit: Fit = "kl"
    bias: LogitBias | None = None
    fraction: float | None = None
    heads: Mapping[str, Sequence[int]] | None = None
    max_drop: float | None = None
    metric: Callable[[nn.Module], float] | None = None
    criterion: Criterion = "change"
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(num_images=self.num_images)
        if self.num_images < MIN_IMAGES:
            raise StaticKeyError(f"num_images={self.num_images} must be at least {MIN_IMAGES}, better 300 to 4,000")
        choices = {"fit": Fit, "criterion": Criterion}
        for name, kinds in choices.items():
            if getattr(self, name) not in get_args(kinds):
                known = ", ".join(map(repr, get_args(kinds)))
                raise StaticKeyError(f"{name}={getattr(self, name)!r} must be one of {known}")
        if self.bias is not None and self.bias not in get_args(LogitBias):
            raise StaticKeyError(f"bias={self.bias!r} must be None, 'key' or 'map'")
        if self.fit == "mean" and self.bias is not None:
            raise StaticKeyError(f"fit='mean' has no bias, got bias={self.bias!r}; use fit='lstsq' or 'kl'")
        given = [name for name in ("fraction", "heads", "max_drop") if getattr(self, name) is not None]
        if len(given) > 1:
            raise StaticKeyError(f"{' and '.join(given)} both choose heads; give one of them")
        if self.fraction is not None and not (isinstance(self.fraction, int | float) and 0 < self.fraction <= 1):
            raise StaticKeyError(f"fraction={self.fraction!r} must be above 0 and at most 1")
        if self.max_drop is not None:
            check_not_negative(max_drop=self.max_drop)
        if self.heads is not None and not (isinstance(self.heads, Mapping) and self.heads):
            raise StaticKeyError(f"heads={self.heads!r} must map names of layers to lists of heads")

    @property
    def layer_bias(self) -> LogitBias | None:
        """The bias of the layers that are made."""
        return "map" if self.fit == "constant" else self.bias

    @property
    def ranks(self) -> bool:
        """Whether heads are converted in an order, rather than all or those named."""
        return self.fraction is not None or self.max_drop is not None

    def value_of(self, model: nn.Module) -> float | None:
        """The metric of a model, if there is one, on a copy that it may change.

        Raises:
            StaticKeyError: It is no finite number.
        """
        if self.metric is None:
            return None
        value = float(self.metric(deepcopy(model)))
        if not math.isfinite(value):
            raise StaticKeyError(f"metric gives {value}; it must be a finite number, the higher the better")
        return value
