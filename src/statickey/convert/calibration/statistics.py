"""What one attention layer's heads do on images: float64 sums over all of them, and a bounded sample of queries."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .masked import MaskedSums
from .reading import LayerCall

SAMPLE_BYTES = 2**28
"""Of one layer's queries, and masks where they differ from image to image, that are held for the divergence's fit."""


@dataclass
class Sample:
    """Queries of some images, and the sums over those images that the divergence of a static map needs besides.

    Queries are scaled, so that logits are ``query . key``.

    Args:
        query: (M, h, N, d).
        mask: Added to the logits, (M or 1, h or 1, N, N), or None.
        map_sum: The maps' sum over the images, (h, N, N), float64.
        pulled: ``sum_i map_ij query_i`` over the images, (h, N, d), float64.
        constant: ``sum map (log map - mask)`` over all, (h,), float64.
    """

    query: Tensor
    mask: Tensor | None
    map_sum: Tensor
    pulled: Tensor
    constant: Tensor


@dataclass
class LayerStatistics:
    """Sums over the images of one layer, for every head; ``kc`` are keys minus their mean over positions.

    Softmax does not see a number common to a row of logits, so logits are taken from ``kc``: they are the nearest to
    static ones whatever is added to a row.

    Attributes, all (h, ...) in float64: ``key_sum`` (N, d) of keys, ``query_sum`` (N, d) of scaled queries, ``gram``
    (d, d) of queries with themselves, ``cross`` (d, N) of ``gram`` of an image times its ``kc``, ``logit_sum`` (N, N)
    of ``query . kc``, ``map_sum`` and ``map_square`` (N, N) of the maps and their squares, and ``mask_sum``, the
    finite part of masks. ``masked`` has what least squares needs where a mask leaves keys out. ``rope``, by which the
    host turns queries and keys, is the last seen.

    Args:
        num_samples: How many images (or windows) will come, of which an evenly spread part is sampled.
    """

    num_samples: int
    count: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    rope: Tensor | None = None
    masked: MaskedSums = field(default_factory=MaskedSums)
    _queries: list[Tensor] = field(default_factory=list)
    _masks: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, calls: Iterable[LayerCall], num_images: int) -> "LayerStatistics":
        """Of all calls on a number of images."""
        made: LayerStatistics | None = None
        for call in calls:
            if made is None:
                made = cls(len(call.query) // call.num_images * num_images)
            made.add(call)
        assert made is not None
        return made

    def add(self, call: LayerCall) -> None:
        """Take in some images.

        Args:
            call: The layer's queries, keys and mask on them.
        """
        query, key = call.query.double(), call.key.double()
        centred = key - key.mean(dim=2, keepdim=True)
        gram = query.mT @ query
        logits = query @ centred.mT
        maps, log_maps = call.maps()
        self._add("key_sum", key.sum(0))
        self._add("query_sum", query.sum(0))
        self._add("gram", gram.sum(0))
        self._add("cross", (gram @ centred.mT).sum(0))
        self._add("logit_sum", logits.sum(0))
        self._add("map_sum", maps.sum(0))
        self._add("map_square", maps.square().sum(0))
        if call.mask is not None:
            mask = call.mask.double().masked_fill(call.mask == float("-inf"), 0.0)
            self._add("mask_sum", mask.expand(len(query), -1, -1, -1).sum(0))
            self.masked.add(query, key, call.mask)
        chosen = self._chosen(call)
        if len(chosen):
            self._sample(call, chosen, maps, log_maps)
        self.count += len(query)
        self.rope = call.rope

    def _add(self, name: str, term: Tensor) -> None:
        self.sums[name] = self.sums[name] + term if name in self.sums else term

    def __getattr__(self, name: str) -> Tensor:
        if name in ("sums", "__deepcopy__") or name not in self.sums:
            raise AttributeError(name)
        return self.sums[name]

    def _chosen(self, call: LayerCall) -> Tensor:
        """Which of these images are sampled: evenly spread over all that come, as many as the bound allows."""
        size = call.query[0].numel() * max(call.query.element_size(), 4)
        if call.mask is not None and len(call.mask) > 1:
            size += call.mask[0].nbytes
        wanted = max(min(SAMPLE_BYTES // size, self.num_samples), 1)
        places = torch.arange(self.count, self.count + len(call.query), device=call.query.device)
        steps = places * wanted // self.num_samples
        return (steps != (places - 1) * wanted // self.num_samples).nonzero().flatten()

    def _sample(self, call: LayerCall, chosen: Tensor, maps: Tensor, log_maps: Tensor) -> None:
        query, maps, log_maps = call.query[chosen], maps[chosen], log_maps[chosen]
        query = query.to(torch.promote_types(query.dtype, torch.float32))  # half is too coarse for a fit
        self._queries.append(query)
        if call.mask is not None:
            one = len(call.mask) == 1
            if one and not self._masks:
                self._masks.append(call.mask)
            elif not one:
                self._masks.append(call.mask[chosen])
            mask = call.mask if one else call.mask[chosen]
            log_maps = log_maps - mask
        self._add("sample_map_sum", maps.sum(0))
        self._add("sample_pulled", (maps.mT @ query.double()).sum(0))
        self._add("sample_constant", torch.where(maps > 0, maps * log_maps, 0.0).sum((0, 2, 3)))

    def sample(self) -> Sample:
        """The sampled queries and their sums."""
        mask = torch.cat(self._masks) if self._masks else None
        sums = (self.sums[f"sample_{name}"] for name in ("map_sum", "pulled", "constant"))
        return Sample(torch.cat(self._queries), mask, *sums)

    def spread(self) -> Tensor:
        """How much a head's map changes from image to image: standard deviation of its entries, as a share of 1/N.

        Returns:
            (h,), the mean over all entries.
        """
        mean = self.map_sum / self.count
        deviation = (self.map_square / self.count - mean.square()).clamp_min(0).sqrt()
        return deviation.mean((1, 2)) * deviation.shape[-1]
