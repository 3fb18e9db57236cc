"""Which function of position should a static key be? Variants, scored on held-out training images.

    python benchmarks/continuous_keys.py PATH_TO_CIFAR10_PARQUET          # train and compare
    python benchmarks/continuous_keys.py PATH_TO_CIFAR10_PARQUET differences   # then: from ska and the default
    python benchmarks/continuous_keys.py PATH_TO_CIFAR10_PARQUET aspect   # and: the trained ones on a wider map

Each variant is a mixer of its own, registered under a name, so that the comparison is the one users run. The folder
may be filled bit by bit, by several processes at once: finished runs are reused.
"""

import math
import sys
from collections.abc import Callable
from statistics import mean, stdev
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from statickey.compare import compare, paired_differences
from statickey.convert import token_mixers
from statickey.data import ImageDataModule
from statickey.layers import MIXERS, ContinuousKey, StaticKeyAttention
from statickey.layers.attention import Rotate
from statickey.layers.windows import Segment
from statickey.tasks import load_model
from statickey.tasks.accuracy import Accuracy
from statickey.tasks.classification import Classification, ClassificationRecipe

SEEDS, LIMIT, HOLDOUT, OUT = (0, 1, 2), 12_000, 0.25, "runs/continuous-keys"


class Variant(StaticKeyAttention):
    """A continuous key with settings of its own."""

    settings: ClassVar[dict[str, Any]] = {}
    std, learned = 1.0, False

    def _make_key(self, shape: tuple[int, ...], std: float, factory: dict[str, Any]) -> ContinuousKey:
        self.key = "continuous"
        made = ContinuousKey(self.num_heads, self.num_prefix_tokens, shape, std=self.std, **self.settings, **factory)
        if self.learned:
            frequencies = made.frequencies
            del made.frequencies
            made.frequencies = nn.Parameter(frequencies)
        return made


class Default(Variant):
    pass


class Frequencies8(Variant):
    settings: ClassVar[dict[str, Any]] = {"num_frequencies": 8}


class Frequencies32(Variant):
    settings: ClassVar[dict[str, Any]] = {"num_frequencies": 32}


class Scale1(Variant):
    settings: ClassVar[dict[str, Any]] = {"frequency_std": 1.0}


class Scale4(Variant):
    settings: ClassVar[dict[str, Any]] = {"frequency_std": 4.0}


class Learned(Variant):
    learned = True


class HalfKey(Variant):
    std = 0.5


class TwiceKey(Variant):
    std = 2.0


class Rotary(StaticKeyAttention):
    """One vector per head, turned by position in planes of learned frequencies: logits q_i R(p_j - p_i) k."""

    def _build_keys(self, factory: dict[str, Any]) -> None:
        self.static_key = nn.Parameter(torch.empty(self.num_heads, 1, self.head_dim, **factory))
        self.frequencies = nn.Parameter(torch.empty(self.num_heads, self.head_dim // 2, 2, **factory))

    def _reset_keys(self) -> None:
        nn.init.normal_(self.static_key)
        nn.init.normal_(self.frequencies, std=2.0 * math.pi / 2)

    def _turned(self, rows: Tensor, feat_size: tuple[int, int]) -> Tensor:
        """(..., h, N, d), each row turned by its place."""
        y, x = ((2 * torch.arange(extent) + 1) / extent - 1 for extent in feat_size)
        places = torch.cartesian_prod(y, x).to(rows)
        angles = torch.einsum("nc,hfc->hnf", places, self.frequencies)
        a, b = rows.chunk(2, dim=-1)
        return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)

    def _segments(
        self, query: Tensor, feat_size: tuple[int, int], rows: Callable[[str], Tensor], turn: Rotate
    ) -> list[Segment]:
        key = self.static_key.expand(-1, feat_size[0] * feat_size[1], -1)
        return [Segment(self._turned(query, feat_size), self._turned(key, feat_size), None, 0)]

    def key_rows(self, grid: Any = None, name: str = "static_key") -> Tensor:
        return self._turned(self.static_key.expand(-1, math.prod(self.feat_size), -1), self.feat_size)


VARIANTS = {
    "continuous": Default,
    "8-frequencies": Frequencies8,
    "32-frequencies": Frequencies32,
    "frequency-std-1": Scale1,
    "frequency-std-4": Scale4,
    "learned-frequencies": Learned,
    "key-std-0.5": HalfKey,
    "key-std-2": TwiceKey,
    "rotary": Rotary,
}


def _by_longer_side(key: ContinuousKey, grid: tuple[int, int]) -> Tensor:
    """The features of a key whose coordinates have one unit on both axes: that of the longer side."""
    y, x = ((2 * torch.arange(extent) + 1 - extent) / max(grid) for extent in grid)
    angles = torch.cartesian_prod(y, x) @ key.frequencies.T
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@torch.no_grad()
def aspect(data: str) -> None:
    """Score the trained networks on a strip of 24 x 32 pixels, its coordinates taken in either way."""
    recipe = ClassificationRecipe(data=data, limit=LIMIT, holdout=HOLDOUT, img_size=32)
    module = ImageDataModule(Classification().read_data(recipe), batch_size=64, holdout=HOLDOUT)
    images, labels = module.normalize(module.val_part.images[:, :, 4:28]), module.val_part.labels
    per_axis = ContinuousKey.features
    for mixer in ("ska", "continuous", "frequency-std-1"):
        for name, features in {"per axis": per_axis, "by the longer side": _by_longer_side}.items():
            scores = []
            for seed in SEEDS:
                model: Any = load_model(f"{OUT}/runs/{mixer}-seed{seed}")[0]
                model.set_input_size((24, 32))
                ContinuousKey.features = features  # type: ignore[assignment, method-assign]
                said = torch.cat([model(part) for part in images.split(250)]).argmax(1)
                scores.append(100 * (said == labels).float().mean().item())
            if token_mixers(model) and (mixer != "ska" or features is per_axis):
                print(f"{mixer:<20} {name:<20} {mean(scores):.2f} +- {stdev(scores):.2f}  {scores}")


def differences() -> None:
    """Print what every variant is above a key of free rows, and above the default."""
    evidence: dict[str, dict[int, Accuracy]] = {}
    for mixer in ("mhsa", "ska", *VARIANTS):
        for seed in SEEDS:
            with np.load(f"{OUT}/runs/{mixer}-seed{seed}/predictions.npz") as saved:
                evidence.setdefault(mixer, {})[seed] = Accuracy(saved["predicted"], saved["truth"])
    for baseline, names in {"ska": list(evidence), "continuous": list(VARIANTS)}.items():
        for name, d in paired_differences(baseline, {each: evidence[each] for each in names}).items():
            print(f"{name:<20} minus {baseline:<10} {d.mean:+.2f}  {d.interval}  p {d.adjusted_p}")


if __name__ == "__main__":
    MIXERS.update(VARIANTS)
    if sys.argv[2:] == ["aspect"]:
        aspect(sys.argv[1])
    elif sys.argv[2:] == ["differences"]:
        differences()
    else:
        recipe = ClassificationRecipe(data=sys.argv[1], limit=LIMIT, holdout=HOLDOUT, epochs=5)
        compare(recipe, mixers=["mhsa", "ska", *VARIANTS], seeds=SEEDS, score_on="holdout", out=OUT)
