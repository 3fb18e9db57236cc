"""Least squares where a mask leaves keys out of rows: windows at the border of a shifted map, or a diagonal."""

from dataclasses import dataclass, field
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from ...layers import LogitBias

_NOTHING = 50.0
"""A mask so far below the largest of its row leaves no weight; hosts write -100, or minus infinity."""
_TOLERANCE = 1e-10
_MAX_STEPS = 1000
_RTOL = 1e-10


class _Rows(NamedTuple):
    """Sums over rows in which the same keys count.

    Attributes: ``gram`` (h, d, d) of queries with themselves; at each place, ``queries`` (h, N, d) and the ``number``
    of rows (N,).
    """

    gram: Tensor
    queries: Tensor
    number: Tensor

    def of(self, heads: list[int], bias: LogitBias | None) -> Tensor:
        """Sum of ``f f^T``, where ``f`` is what a row's keys and bias are multiplied with, (h, m, m)."""
        gram, queries, number = self.gram[heads], self.queries[heads], self.number
        if bias is None:
            return gram
        if bias == "key":
            queries, number = queries.sum(1, keepdim=True), number.sum(0, keepdim=True)
        ones = torch.diag(number).expand(len(queries), -1, -1)
        return torch.cat([torch.cat([gram, queries.mT], dim=-1), torch.cat([queries, ones], dim=-1)], dim=-2)


@dataclass
class MaskedSums:
    """Sums over the rows of a layer's logits, apart for each set of keys that count in a row.

    Attributes: ``sets``, each (N,), true for keys that count; ``rows``, the sums of each set; of all rows, with
    logits less their mean over the keys that count, ``cross`` (h, N, d), of logits times queries, and ``logits``
    (h, N, N), keys first.
    """

    sets: list[Tensor] = field(default_factory=list)
    rows: list[_Rows] = field(default_factory=list)
    cross: Tensor | float = 0.0
    logits: Tensor | float = 0.0

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
        self.cross = self.cross + (logits.mT @ query).sum(0)
        self.logits = self.logits + logits.sum(0).mT
        sets, which = torch.unique(counts.flatten(0, 1), dim=0, return_inverse=True)
        for index, own in enumerate(sets):
            rows = (which == index).view(len(counts), 1, -1, 1).expand(len(query), -1, -1, -1).double()
            part = query * rows
            found = _Rows((part.mT @ part).sum(0), part.sum(0), rows.sum((0, 1, 3)))
            place = next((place for place, other in enumerate(self.sets) if torch.equal(own, other)), None)
            if place is None:
                self.sets.append(own)
                self.rows.append(found)
            else:
                self.rows[place] = _Rows(*map(torch.add, self.rows[place], found))

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
        assert isinstance(self.cross, Tensor) and isinstance(self.logits, Tensor)
        target, added = self.cross[heads], self.logits[heads]
        if bias is not None:
            target = torch.cat([target, added if bias == "map" else added.sum(-1, keepdim=True)], dim=-1)
        grams = [rows.of(heads, bias) for rows in self.rows]
        values, vectors = torch.linalg.eigh(reduce(torch.add, grams))
        kept = values > _RTOL * values[:, -1:]
        turn = vectors * torch.where(kept, values.clamp_min(1e-300).rsqrt(), 0.0).unsqueeze(1)
        grams = [turn.mT @ gram @ turn for gram in grams]
        key, added = (self._conjugate_gradients(grams, target @ turn) @ turn.mT).tensor_split([width], dim=-1)
        return key, {None: None, "key": added.squeeze(-1), "map": added.mT}[bias]

    def _conjugate_gradients(self, grams: list[Tensor], target: Tensor) -> Tensor:
        found, left = torch.zeros_like(target), target
        step, size = left, _square(left)
        enough = _TOLERANCE**2 * size
        for _ in range(_MAX_STEPS):
            if bool((size <= enough).all()):
                break
            moved = reduce(torch.add, map(_centred, (step @ gram for gram in grams), self.sets))
            rate = size / (step * moved).sum((1, 2), keepdim=True).clamp_min(1e-300)
            found, left = found + rate * step, left - rate * moved
            before, size = size, _square(left)
            step = left + size / before.clamp_min(1e-300) * step
        return found


def _centred(x: Tensor, own: Tensor) -> Tensor:
    """(h, N, m) less its mean over a set of the N, and zero outside."""
    counted = own.to(x).unsqueeze(-1)
    inside = x * counted
    return inside - counted * inside.sum(1, keepdim=True) / counted.sum()


def _square(x: Tensor) -> Tensor:
    return x.square().sum((1, 2), keepdim=True)
