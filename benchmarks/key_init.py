"""How should a fresh static key start? Variants of initialisation, scored on held-out training images.

    python benchmarks/key_init.py PATH_TO_CIFAR10_PARQUET

Each variant is a mixer of its own, registered under a name, so that the comparison is the one users run.
The folder may be filled bit by bit: finished runs are reused.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from statickey.compare import compare
from statickey.layers import MIXERS, FactorizedConvStaticKeyAttention, StaticKeyAttention
from statickey.tasks.classification import ClassificationRecipe


class UnitNormal(StaticKeyAttention):
    """The reference's choice."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.static_key)


class Small(StaticKeyAttention):
    """Maps start uniform."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.trunc_normal_(self.static_key, std=0.02)


class Matched(StaticKeyAttention):
    """The variance that self-attention's keys have at the start: Xavier weights on a normalised input."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        inner = self.num_heads * self.head_dim
        nn.init.normal_(self.static_key, std=(2 * self.dim / (self.dim + 3 * inner)) ** 0.5)


class FactorizedUnit(FactorizedConvStaticKeyAttention):
    """Convolution alone, unit normal key."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.static_key)


class FactorizedSmall(FactorizedConvStaticKeyAttention):
    """Convolution alone, small key."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.trunc_normal_(self.static_key, std=0.02)


class FactorizedIdentity(FactorizedSmall):
    """Convolution alone, starting as the identity: at first the layer is SKA."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        conv = self.query_conv
        nn.init.zeros_(conv.bias)
        nn.init.zeros_(conv.weight)
        centre = conv.kernel_size[0] // 2
        with torch.no_grad():
            for row in range(conv.out_channels):
                conv.weight[row, row % self.head_dim, centre, centre] = 1.0


class FactorizedAdded(FactorizedSmall):
    """Convolution added to the query, small key."""

    def _segments(self, query: Tensor, feat_size: tuple[int, int], rows: Any, turn: Any) -> list[Any]:
        (segment,) = super()._segments(query, feat_size, rows, turn)
        return [segment._replace(query=segment.query + query)]


VARIANTS = {
    "ska-unit": UnitNormal,
    "ska-0.02": Small,
    "ska-matched": Matched,
    "fcska-unit": FactorizedUnit,
    "fcska-0.02": FactorizedSmall,
    "fcska-identity": FactorizedIdentity,
    "fcska-added": FactorizedAdded,
}

if __name__ == "__main__":
    MIXERS.update(VARIANTS)
    recipe = ClassificationRecipe(data=sys.argv[1], limit=12_000, holdout=0.25, epochs=5)
    compare(recipe, mixers=list(VARIANTS), seeds=(0, 1), score_on="holdout", out="runs/key-init")
