"""Static keys for the heads of a layer, in closed form from its statistics."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...layers import LogitBias
from .divergence import fit_divergence
from .statistics import LayerStatistics

Fit = Literal["kl", "lstsq", "mean", "constant"]
"""What a head's static map is nearest in: distribution, logits, keys; or a map that does not see the input at all."""

_RTOL = 1e-10


@dataclass(frozen=True)
class HeadKeys:
    """Static keys for some heads, against scaled queries: logits are ``query . key`` and the bias, if any.

    Args:
        key: (h, N, d), float64.
        key_bias: (h, N), or None.
        map_bias: (h, N, N), or None.
    """

    key: Tensor
    key_bias: Tensor | None = None
    map_bias: Tensor | None = None

    def logits(self, query: Tensor) -> Tensor:
        """(B, h, N, d) to (B, h, N, N), float64."""
        logits = query.double() @ self.key.mT
        if self.key_bias is not None:
            logits = logits + self.key_bias.unsqueeze(-2)
        return logits if self.map_bias is None else logits + self.map_bias

    def of(self, heads: list[int]) -> "HeadKeys":
        """Those of some heads."""
        return HeadKeys(*(None if part is None else part[heads] for part in self._parts()))  # type: ignore[arg-type]

    def _parts(self) -> tuple[Tensor | None, ...]:
        return self.key, self.key_bias, self.map_bias


def fit_heads(
    statistics: LayerStatistics, fit: Fit, bias: LogitBias | None, heads: list[int], near: HeadKeys | None = None
) -> HeadKeys:
    """Static keys for some heads of a layer.

    Args:
        statistics: Of the layer on the calibration images.
        fit: What is made small.
        bias: What is added to logits; ``"constant"`` has a map and ``"mean"`` none, whatever this says.
        heads: Which heads.
        near: Keys of these heads from where the divergence's fit may start, found on like images.

    Returns:
        Their keys, in this order.
    """
    if fit == "mean":
        return HeadKeys(statistics.key_sum[heads] / statistics.count)
    if fit == "constant":
        return constant_map(statistics, heads)
    nearest = least_squares(statistics, bias, heads)
    if fit == "lstsq":
        return nearest
    sample = statistics.sample()
    starts = [nearest, *([] if near is None else [near])]
    if bias == "map":
        starts.append(constant_map(statistics, heads))
    fitted = [
        fit_divergence(sample, head, [_numbers(start, place) for start in starts], bias)
        for place, head in enumerate(heads)
    ]
    keys = torch.stack([key for key, _ in fitted])
    biases = torch.stack([added for _, added in fitted if added is not None]) if bias is not None else None
    return HeadKeys(keys, biases if bias == "key" else None, biases if bias == "map" else None)


def _numbers(keys: HeadKeys, place: int) -> tuple[Tensor, Tensor | None]:
    bias = keys.key_bias if keys.map_bias is None else keys.map_bias
    return keys.key[place], None if bias is None else bias[place]


def constant_map(statistics: LayerStatistics, heads: list[int]) -> HeadKeys:
    """Keys of zero, and a bias that makes every map the mean of the calibration images' maps.

    With a mask that differs between images the bias is what their mean leaves.
    """
    mean = (statistics.map_sum[heads] / statistics.count).clamp_min(1e-12).log()
    if "mask_sum" in statistics.sums:
        mask = statistics.mask_sum / statistics.count
        mean = mean - (mask[heads] if len(mask) > 1 else mask)
    return HeadKeys(torch.zeros_like(statistics.key_sum[heads]), map_bias=mean - mean.mean(-1, keepdim=True))


def least_squares(statistics: LayerStatistics, bias: LogitBias | None, heads: list[int]) -> HeadKeys:
    """The keys whose logits have the least squared error over all images, queries and keys that a mask leaves.

    What is common to a row of logits does not count. Keys are centred, as softmax does not see their mean.

    Source:
        The normal equations: with logits ``q_i . k_j``, ``K_j = (sum q q^T)^-1 sum q (q . k_j)``, with a bias for
        each pair of places after taking each position's mean off ``q`` and the logits.
    """
    if statistics.masked.leave_keys_out:
        key, added = statistics.masked.solve(bias, heads, statistics.gram.shape[-1])
        return HeadKeys(key, added if bias == "key" else None, added if bias == "map" else None)
    gram, cross = statistics.gram[heads], statistics.cross[heads]
    if bias is None:
        return HeadKeys(_solve(gram, cross))
    count, query_sum, logit_sum = statistics.count, statistics.query_sum[heads], statistics.logit_sum[heads]
    if bias == "map":
        gram = gram - query_sum.mT @ query_sum / count
        key = _solve(gram, cross - query_sum.mT @ logit_sum / count)
        return HeadKeys(key, map_bias=(logit_sum - query_sum @ key.mT) / count)
    rows = count * query_sum.shape[1]
    mean_query, mean_logits = query_sum.sum(1, keepdim=True) / rows, logit_sum.sum(1, keepdim=True) / rows
    gram = gram - rows * mean_query.mT @ mean_query
    key = _solve(gram, cross - rows * mean_query.mT @ mean_logits)
    return HeadKeys(key, key_bias=(mean_logits - mean_query @ key.mT).squeeze(1))


def _solve(gram: Tensor, cross: Tensor) -> Tensor:
    """(h, d, d) and (h, d, N) to keys (h, N, d), the smallest where queries leave a choice."""
    solved: Tensor = torch.linalg.pinv(gram, hermitian=True, rtol=_RTOL) @ cross
    return solved.mT
