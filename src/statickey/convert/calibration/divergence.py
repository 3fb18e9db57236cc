"""The static key whose maps are nearest to a head's own in Kullback-Leibler divergence: a convex problem."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...layers import LogitBias
from .statistics import Sample

TOLERANCE = 1e-3
"""The fit stops when ``ROUND`` steps lower the divergence by less than this share of it."""
ROUND = 10
MAX_ROUNDS = 40
_CHUNK_BYTES = 2**24
_FLOOR = 1e-8
"""Directions in which queries vary less than this share of the widest are left out."""

Numbers = tuple[Tensor, Tensor | None]
"""A head's key (N, d), and its bias, (N,) or (N, N), or None."""


def fit_divergence(
    sample: Sample,
    head: int,
    starts: Sequence[Numbers],
    bias: LogitBias | None,
    *,
    tolerance: float = TOLERANCE,
) -> Numbers:
    """Minimise the mean over queries of ``KL(map || softmax(query . key + bias + mask))``.

    It is a regression with N classes, convex in key and bias. L-BFGS runs in coordinates in which its curvature is
    about even: queries centred and of unit covariance, each key's numbers scaled by how much attention it gets. It
    stops when ten steps lower the divergence by less than ``tolerance`` of it, or after 400.

    Args:
        sample: Queries and maps of the layer.
        head: Which head.
        starts: Where to start: the best of these.
        bias: What is added to the logits.
        tolerance: Share of the divergence.

    Returns:
        The key and the bias, float64.
    """
    problem = _Problem.of(sample, head, bias)
    candidates = [problem.from_numbers(start) for start in starts]
    values = [problem.value_and_gradient(point)[0] for point in candidates]
    best = min(range(len(candidates)), key=values.__getitem__)
    return problem.to_numbers(_minimise(problem, candidates[best], values[best], tolerance))


def divergence(sample: Sample, head: int, numbers: Numbers, bias: LogitBias | None) -> float:
    """What ``fit_divergence`` makes small, in nats."""
    problem = _Problem.of(sample, head, bias)
    return problem.value_and_gradient(problem.from_numbers(numbers))[0]


def _minimise(problem: "_Problem", start: Tensor, value: float, tolerance: float) -> Tensor:
    point = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [point],
        max_iter=ROUND,
        max_eval=4 * ROUND,
        history_size=20,
        tolerance_grad=1e-14,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        value, gradient = problem.value_and_gradient(point.detach())
        point.grad = gradient
        return value

    best = start
    for _ in range(MAX_ROUNDS):
        optimizer.step(closure)  # type: ignore[no-untyped-call]
        now = problem.value_and_gradient(point.detach())[0]
        if not now < value:
            break
        best, before, value = point.detach().clone(), value, now
        if before - now < tolerance * abs(now):
            break
    return best


@dataclass(frozen=True)
class _Problem:
    """The divergence in even coordinates: ``key_j = scale_j * basis @ w_j`` on centred queries, and ``scale * b``."""

    query: Tensor  # (M, N, r): centred, of unit covariance
    mask: Tensor | None  # (M or 1, N, N)
    map_sum: Tensor  # (N, N)
    pulled: Tensor  # (N, r)
    constant: float
    centre: Tensor  # (1 or N, d)
    basis: Tensor  # (d, r)
    inverse: Tensor  # (r, d)
    key_scale: Tensor  # (N, 1)
    bias_scale: Tensor | None  # (N,) or (N, N)

    @classmethod
    def of(cls, sample: Sample, head: int, bias: LogitBias | None) -> "_Problem":
        query, map_sum = sample.query[:, head], sample.map_sum[head]
        images, tokens, _ = query.shape
        rows = images * tokens
        wide = query.double()
        if bias == "map":
            centre = wide.mean(0)
        elif bias == "key":
            centre = wide.mean((0, 1)).unsqueeze(0)
        else:
            centre = torch.zeros_like(wide[0, :1])
        centred = wide - centre
        flat = centred.flatten(0, 1)
        variance, directions = torch.linalg.eigh(flat.mT @ flat / rows)
        kept = variance > _FLOOR * variance[-1].clamp_min(1e-30)
        root = variance[kept].sqrt()
        basis, inverse = directions[:, kept] / root, (directions[:, kept] * root).mT
        pulled = (sample.pulled[head] - map_sum.mT @ centre.expand(tokens, -1)) @ basis
        share = map_sum / images  # of each pair of places
        key_scale = _evened(share.mean(0), tokens).unsqueeze(1)
        bias_scale = None
        if bias == "key":
            bias_scale = key_scale.squeeze(1)
        elif bias == "map":
            bias_scale = _evened(share, tokens) * tokens**0.5  # a row is one of N
        mask = None if sample.mask is None else sample.mask[:, head if sample.mask.shape[1] > 1 else 0]
        return cls(
            (centred @ basis).to(query.dtype),
            mask,
            map_sum,
            pulled,
            float(sample.constant[head]),
            centre,
            basis,
            inverse,
            key_scale,
            bias_scale,
        )

    def from_numbers(self, numbers: Numbers) -> Tensor:
        """The point (one vector) at a key and a bias."""
        key, bias = numbers
        key = key - key.mean(0)
        parts = [(key @ self.inverse.mT / self.key_scale).flatten()]
        if self.bias_scale is not None:
            bias = torch.zeros_like(self.bias_scale) if bias is None else bias
            added = bias + (self.centre @ key.mT if bias.ndim == 2 else (key @ self.centre.mT).squeeze(1))
            parts.append(((added - added.mean(-1, keepdim=True)) / self.bias_scale).flatten())
        return torch.cat(parts)

    def to_numbers(self, point: Tensor) -> Numbers:
        """The key and the bias at a point, each without what softmax does not see."""
        weights, added = self._parts(point)
        key = weights @ self.basis.mT
        key = key - key.mean(0)
        if added is None:
            return key, None
        bias = added - (self.centre @ key.mT if added.ndim == 2 else (key @ self.centre.mT).squeeze(1))
        return key, bias - bias.mean(-1, keepdim=True)

    def _parts(self, point: Tensor) -> tuple[Tensor, Tensor | None]:
        size = self.key_scale.shape[0] * self.basis.shape[1]
        weights = point[:size].view(-1, self.basis.shape[1]) * self.key_scale
        if self.bias_scale is None:
            return weights, None
        return weights, point[size:].view(self.bias_scale.shape) * self.bias_scale

    def value_and_gradient(self, point: Tensor) -> tuple[float, Tensor]:
        """The divergence in nats, a mean over queries, and its gradient, float64."""
        weights, added = self._parts(point)
        images, tokens, _ = self.query.shape
        rows = images * tokens
        normaliser = torch.zeros((), dtype=torch.float64, device=point.device)
        drawn = torch.zeros_like(self.pulled)
        total = torch.zeros_like(self.map_sum)
        narrow = weights.to(self.query.dtype).mT
        own_bias = None if added is None else added.to(self.query.dtype)
        size = max(_CHUNK_BYTES // (tokens * tokens * self.query.element_size()), 1)
        for start in range(0, images, size):
            query = self.query[start : start + size]
            logits = query @ narrow
            if own_bias is not None:
                logits += own_bias
            if self.mask is not None:
                logits += self.mask if len(self.mask) == 1 else self.mask[start : start + size]
            peak = logits.amax(-1, keepdim=True)
            maps = logits.sub_(peak).exp_()
            sums = maps.sum(-1, keepdim=True)
            normaliser += (peak.double() + sums.double().log()).sum()
            maps /= sums
            drawn += (maps.flatten(0, 1).mT @ query.flatten(0, 1)).double()
            total += maps.sum(0).double()
        fit = (self.pulled * weights).sum()
        gradients = [((drawn - self.pulled) * self.key_scale).flatten()]
        if added is not None and self.bias_scale is not None:
            of_keys = added.ndim == 1
            fit = fit + (self.map_sum.sum(0) * added if of_keys else self.map_sum * added).sum()
            difference = total - self.map_sum
            gradients.append(((difference.sum(0) if of_keys else difference) * self.bias_scale).flatten())
        value = (normaliser - fit + self.constant) / rows
        return float(value), torch.cat(gradients) / rows


def _evened(share: Tensor, tokens: int) -> Tensor:
    """Scale of numbers whose curvature is the variance of what gets ``share`` of the attention."""
    return (share * (1 - share)).clamp_min(1e-2 / tokens).rsqrt()
