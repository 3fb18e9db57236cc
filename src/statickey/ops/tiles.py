"""Attention on a static key by parts of the map that stay in the CPU's cache."""

from collections.abc import Iterator
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._typing import Size2
from .grid import fold_queries, unfold_queries
from .recompute import needs_differentiable_backward, recomputed_gradients

TILE_NUMEL = 5 << 18
"""Most elements in the logits and queries of one tile, 5 MiB in float32. Queries are unfolded for all rows of an
image at once, which may be more."""
KEPT_NUMEL = 1 << 23
"""Largest map that forward keeps for backward, 32 MiB in float32; a larger one is recomputed."""


def tiled_attention(
    query: Tensor,
    key: Tensor,
    key_bias: Tensor | None,
    value: Tensor,
    mask: Tensor | None,
    unfold: tuple[Size2, int] | None = None,
) -> Tensor:
    """Compute ``softmax(query @ key^T + key_bias + mask) @ value`` and, backwards, its gradients.

    A key without a batch axis makes the logits of several images one matrix product, and lets them be made,
    normalised and used a part at a time. A large map is never stored whole: backward recomputes it.

    Args:
        query: (B, h, N, dk), any strides; with ``unfold``, what ``unfold_queries`` takes.
        key: (h, M, dk), scaled.
        key_bias: (h, M), scaled.
        value: (B, h, M, dv).
        mask: Added to the logits; broadcasts to (B, h, N, M), four axes.
        unfold: ``(feat_size, kernel_size)`` to attend with unfolded queries, made a part at a time.

    Returns:
        (B, h, N, dv), token-major in memory, as the output projection reads it.
    """
    out: Tensor = _TiledAttention.apply(query, key, key_bias, value, mask, unfold)
    return out


class _Tile(NamedTuple):
    """Some heads, images and rows of the map; several heads only with all images, part of the rows only with one."""

    heads: slice
    images: slice
    rows: slice

    def token_part(self, tensor: Tensor) -> Tensor:
        """The part of (B, h, N, d), head-major, (heads, images, rows, d)."""
        return tensor[self.images, self.heads, self.rows].transpose(0, 1)

    def key_matrices(self, tensor: Tensor) -> Tensor:
        """The part of (B, h, M, d), one matrix per head and image, (heads * images, M, d)."""
        return tensor[self.images, self.heads].transpose(0, 1).flatten(0, 1)

    def mask_part(self, mask: Tensor) -> Tensor:
        """The part of a mask whose axes may have extent one, head-major."""
        cuts = zip((self.images, self.heads, self.rows), mask.shape, strict=False)
        return mask[tuple(cut if extent > 1 else slice(None) for cut, extent in cuts)].transpose(0, 1)

    @property
    def shape(self) -> torch.Size:
        """Heads, images and rows."""
        return torch.Size(cut.stop - cut.start for cut in self)


def _tiles(batch: int, num_queries: int, key: Tensor) -> Iterator[_Tile]:
    """The tiles of the map for a number of queries in every image and keys (h, M, dk)."""
    heads = len(key)
    most = TILE_NUMEL // sum(key.shape[1:])
    rows = _part_extent(num_queries, most)
    images = _part_extent(batch, most // num_queries)
    together = _part_extent(heads, most // max(1, num_queries * batch))
    for head in range(0, heads, together):
        for image in range(0, batch, images):
            for row in range(0, num_queries, rows):
                yield _Tile(
                    slice(head, min(head + together, heads)),
                    slice(image, min(image + images, batch)),
                    slice(row, min(row + rows, num_queries)),
                )


def _part_extent(whole: int, most: int) -> int:
    """The extent of the fewest parts of about equal size that are at most ``most`` long."""
    parts = -(-whole // max(1, most))
    return max(1, -(-whole // max(1, parts)))


def _product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Batched product; a batch of one takes ``mm``, which uses all threads."""
    if len(left) == 1:
        return torch.mm(left[0], right[0], out=None if out is None else out[0]).unsqueeze(0)
    return torch.bmm(left, right, out=out)


def _add_product(left: Tensor, right: Tensor, into: Tensor) -> None:
    """Add a batched product to what is there."""
    if len(left) == 1:
        into[0].addmm_(left[0], right[0])
    else:
        into.baddbmm_(left, right)


class _TileQueries:
    """The queries of one tile after the other, unfolded if asked for, once for all rows of an image."""

    def __init__(self, query: Tensor, unfold: tuple[Size2, int] | None) -> None:
        self._query, self._unfold = query, unfold
        self.number = query.shape[2] if unfold is None else prod(unfold[0])
        self._unfolded_for: tuple[slice, slice] | None = None
        self._unfolded = self._grad = query

    def __call__(self, tile: _Tile) -> Tensor:
        """One matrix per head, (heads, images * rows, dk)."""
        if self._unfold is None:
            return tile.token_part(self._query).flatten(1, 2)
        if self._unfolded_for != (tile.heads, tile.images):
            self._unfolded_for = (tile.heads, tile.images)
            self._unfolded = unfold_queries(self._query[tile.images, tile.heads], *self._unfold).transpose(0, 1)
        return self._unfolded[:, :, tile.rows].flatten(1, 2)

    def backward(self, tile: _Tile, grad: Tensor, into: Tensor) -> None:
        """Write the gradient of the tile's queries, (heads, images * rows, dk), to that of all queries."""
        grad = grad.view(*tile.shape, -1)
        if self._unfold is None:
            tile.token_part(into).copy_(grad)
            return
        if tile.rows.start == 0:
            whole = tile.rows.stop == self.number
            self._grad = grad if whole else grad.new_empty(*tile.shape[:2], self.number, grad.shape[-1])
        if self._grad is not grad:
            self._grad[:, :, tile.rows] = grad
        if tile.rows.stop == self.number:
            folded = fold_queries(self._grad, *self._unfold, bordered=into.shape[2] != self.number)
            into[tile.images, tile.heads] = folded.transpose(0, 1)


def _weights(
    tile: _Tile, flat: Tensor, key: Tensor, key_bias: Tensor | None, mask: Tensor | None, buffer: Tensor
) -> Tensor:
    """The tile of the map, (heads, images, rows, M), for its queries, written to the given buffer."""
    columns = key[tile.heads].mT
    logits = buffer.view(*flat.shape[:2], -1)
    if key_bias is None:
        _product(flat, columns, logits)
    elif len(flat) == 1:
        torch.addmm(key_bias[tile.heads], flat[0], columns[0], out=logits[0])
    else:
        torch.baddbmm(key_bias[tile.heads].unsqueeze(1), flat, columns, out=logits)
    weights = logits.view(tile.shape + logits.shape[-1:])
    if mask is not None:
        weights += tile.mask_part(mask)
    return torch.softmax(weights, -1, out=weights)


def _untiled_attention(
    query: Tensor,
    key: Tensor,
    key_bias: Tensor | None,
    value: Tensor,
    mask: Tensor | None,
    unfold: tuple[Size2, int] | None,
) -> Tensor:
    """``tiled_attention`` without tiles, in operations that can be differentiated twice."""
    if unfold is not None:
        query = unfold_queries(query, *unfold)
    logits = torch.einsum("bhnd,hmd->bhnm", query, key)
    if key_bias is not None:
        logits = logits + key_bias.unsqueeze(1)
    if mask is not None:
        logits = logits + mask
    return logits.softmax(-1) @ value


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        key_bias: Tensor | None,
        value: Tensor,
        mask: Tensor | None,
        unfold: tuple[Size2, int] | None,
    ) -> Tensor:
        queries = _TileQueries(query, unfold)
        batch, heads, num_keys, width = value.shape
        out = value.new_empty(batch, queries.number, heads, width).transpose(1, 2)
        size = batch * heads * queries.number * num_keys
        keep = any(ctx.needs_input_grad) and size <= KEPT_NUMEL
        buffer = query.new_empty(size if keep else min(size, max(TILE_NUMEL, num_keys)))
        start = 0
        for tile in _tiles(batch, queries.number, key):
            end = start + tile.shape.numel() * num_keys
            weights = _weights(tile, queries(tile), key, key_bias, mask, buffer[start:end])
            part = _product(weights.flatten(0, 1), tile.key_matrices(value))
            tile.token_part(out).copy_(part.view(*tile.shape, -1))
            start = end if keep else 0
        ctx.save_for_backward(query, key, key_bias, value, mask, buffer if keep else None)
        ctx.unfold = unfold
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, kept = ctx.saved_tensors
        if needs_differentiable_backward(grad_out):  # tiles are written in place
            untiled = partial(_untiled_attention, unfold=ctx.unfold)
            return *recomputed_gradients(untiled, inputs, ctx.needs_input_grad[:5], grad_out), None
        query, key, key_bias, value, mask = inputs
        grads = [
            torch.zeros_like(x) if needed else None for x, needed in zip(inputs, ctx.needs_input_grad, strict=False)
        ]
        grad_query, grad_key, grad_bias, grad_value, grad_mask = grads
        queries = _TileQueries(query, ctx.unfold)
        batch, heads, num_keys, _ = value.shape
        largest = min(batch * heads * queries.number * num_keys, max(TILE_NUMEL, num_keys))
        buffer = query.new_empty(largest)
        recomputed = query.new_empty(largest if kept is None else 0)
        start = 0
        for tile in _tiles(batch, queries.number, key):
            flat = queries(tile)
            size = tile.shape.numel() * num_keys
            if kept is None:
                weights = _weights(tile, flat, key, key_bias, mask, recomputed[:size])
            else:
                weights = kept[start : start + size].view(*tile.shape, num_keys)
                start += size
            matrices, grad_part = weights.flatten(0, 1), tile.token_part(grad_out).flatten(0, 1)
            if grad_value is not None:
                part = _product(matrices.mT, grad_part)
                grad_value[tile.images, tile.heads] += part.view(*tile.shape[:2], num_keys, -1).transpose(0, 1)
            grad_logits = buffer[:size].view_as(matrices)
            _product(grad_part, tile.key_matrices(value).mT, grad_logits)
            torch.ops.aten._softmax_backward_data.out(
                grad_logits, matrices, -1, matrices.dtype, grad_input=grad_logits
            )
            if grad_mask is not None:
                grad_mask_part = tile.mask_part(grad_mask)
                grad_mask_part += grad_logits.view_as(weights).sum_to_size(grad_mask_part.shape)
            grad_logits = grad_logits.view(tile.shape[0], -1, num_keys)
            if grad_query is not None:
                queries.backward(tile, _product(grad_logits, key[tile.heads]), grad_query)
            if grad_key is not None:
                _add_product(grad_logits.mT, flat, grad_key[tile.heads])
            if grad_bias is not None:
                grad_bias[tile.heads] += grad_logits.sum(1)
        return *grads, None
