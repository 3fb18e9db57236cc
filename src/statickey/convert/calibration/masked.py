"""Least squares where a mask leaves keys out of rows: windows at the border of a shifted map, or a diagonal."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...layers import LogitBias

_NOTHING = 50.0
"""A mask so far below the largest of its row leaves no weight; hosts write -100, or minus infinity."""
_TOLERANCE = 1e-10
_MAX_STEPS = 1000
_RTOL = 1e-10


@dataclass
class MaskedSums:
    """Sums over the rows of a layer's logits, apart for each set of keys that count in a row.

    A row is of a query and its place, in numbers ``f``: the query's, and a one for its place among N, (d + N).

    Attributes: ``sets``, each (N,), true for keys that count; ``grams``, for each the sum of ``f f^T``,
    (h, d + N, d + N); ``target``, of all rows the sum of logits, less their mean over the keys that count, times
    ``f``, (h, N, d + N).
    """

    sets: list[Tensor] = field(default_factory=list)
    grams: list[Tensor] = field(default_factory=list)
    target: Tensor | None = None

    @property
    def leave_keys_out(self) -> bool:
        """Whether there is a row in which not all keys count."""
        return not all(bool(counts.all()) for counts in self.sets)

    def add(self, query: Tensor, key: Tensor, mask: Tensor) -> None:
        """Take in some images, or windows.

        Args:
            query: Scaled, (B, h, N, d), float64.
            key: (B, h, N, d), float64.
            mask: (1 or B, 1 or h, N, N); which keys count is the same for all heads.
        """
        counts = mask[:, 0] > mask[:, 0].amax(-1, keepdim=True) - _NOTHING
        counted = counts[:, None].double()
        logits = (query @ key.mT) * counted
        logits = (logits - logits.sum(-1, keepdim=True) / counted.sum(-1, keepdim=True)) * counted
        target = torch.cat([torch.einsum("bhij,bhid->hjd", logits, query), logits.sum(0).mT], dim=-1)
        self.target = target if self.target is None else self.target + target
        sets, which = torch.unique(counts.flatten(0, 1), dim=0, return_inverse=True)
        for index, own in enumerate(sets):
            rows = (which == index).view(len(counts), 1, -1, 1).expand(len(query), -1, -1, -1).double()
            gram = _gram(query * rows, rows.sum((0, 1, 3)))
            place = next((place for place, other in enumerate(self.sets) if torch.equal(own, other)), None)
            if place is None:
                self.sets.append(own)
                self.grams.append(gram)
            else:
                self.grams[place] = self.grams[place] + gram

    def solve(self, bias: LogitBias | None, heads: list[int], width: int) -> tuple[Tensor, Tensor | None]:
        """The keys, and what is added to logits, whose logits are nearest where they count, up to a number a row.

        Args:
            bias: What is added.
            heads: Which heads.
            width: d.

        Returns:
            (h, N, d), and (h, N), (h, N, N) or None.

        Source:
            Conjugate gradients on the normal equations ``sum_s P_s X G_s = T``, with ``P_s`` taking off the mean over
            set s, and numbers turned so that ``sum_s G_s`` is the identity: without masks that is one step.
        """
        assert self.target is not None
        numbers = _numbers(bias, width, self.target.shape[-1] - width).to(self.target)
        grams = [numbers.mT @ gram[heads] @ numbers for gram in self.grams]
        values, vectors = torch.linalg.eigh(torch.stack(grams).sum(0))
        kept = values > _RTOL * values[:, -1:]
        turn = vectors * torch.where(kept, values.clamp_min(1e-300).rsqrt(), 0.0).unsqueeze(1)
        grams = [turn.mT @ gram @ turn for gram in grams]
        found = self._conjugate_gradients(grams, self.target[heads] @ numbers @ turn) @ turn.mT
        if bias is None:
            return found, None
        added = found[..., width:]
        return found[..., :width], added.squeeze(-1) if bias == "key" else added.mT

    def _conjugate_gradients(self, grams: list[Tensor], target: Tensor) -> Tensor:
        found, left = torch.zeros_like(target), target
        step, size = left, _square(left)
        enough = _TOLERANCE**2 * size
        for _ in range(_MAX_STEPS):
            if bool((size <= enough).all()):
                break
            moved = sum(_centred(step @ gram, own) for gram, own in zip(grams, self.sets, strict=True))
            assert isinstance(moved, Tensor)
            rate = size / (step * moved).sum((1, 2), keepdim=True).clamp_min(1e-300)
            found, left = found + rate * step, left - rate * moved
            before, size = size, _square(left)
            step = left + size / before.clamp_min(1e-300) * step
        return found


def _gram(query: Tensor, counts: Tensor) -> Tensor:
    """Sum of ``f f^T``, (h, d + N, d + N), of queries (B, h, N, d) and how many there are for each place, (N,)."""
    sums = query.sum(0)
    ones = torch.diag(counts).expand(len(sums), -1, -1)
    top = torch.cat([torch.einsum("bhnd,bhne->hde", query, query), sums.mT], dim=-1)
    return torch.cat([top, torch.cat([sums, ones], dim=-1)], dim=-2)


def _numbers(bias: LogitBias | None, width: int, places: int) -> Tensor:
    """From what a row has, (d + N), to what keys and bias are multiplied with: the query; a one; or its place too."""
    all_of_them = torch.eye(width + places)
    if bias == "map":
        return all_of_them
    query, place = all_of_them.split_with_sizes([width, places], dim=1)
    return query if bias is None else torch.cat([query, place.sum(1, keepdim=True)], dim=1)


def _centred(x: Tensor, own: Tensor) -> Tensor:
    """(h, N, m) less its mean over a set of the N, and zero outside."""
    counted = own.to(x).unsqueeze(-1)
    inside = x * counted
    return inside - counted * inside.sum(1, keepdim=True) / counted.sum()


def _square(x: Tensor) -> Tensor:
    return x.square().sum((1, 2), keepdim=True)
