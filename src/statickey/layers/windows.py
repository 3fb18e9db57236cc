"""Queries that share a key, and attention in windows of the grid the key was built for."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._typing import Size2
from ..errors import FeatSizeError
from ..ops import window_key_rows, window_merge, window_partition
from .attention import AttendOp


class Segment(NamedTuple):
    """Queries of consecutive tokens that share one key."""

    query: Tensor
    key: Tensor
    key_bias: Tensor | None
    first_token: int
    unfold: tuple[Size2, int] | None = None

    def attend(self, op: AttendOp, value: Tensor) -> Tensor:
        """Call the op; under autocast projections are half precision and keys are not: cast before broadcasting."""
        key = self.key.to(self.query.dtype)
        bias = None if self.key_bias is None else self.key_bias.to(self.query.dtype)
        return op(self.query, key, value, key_bias=bias, query_offset=self.first_token, unfold=self.unfold)

    def with_key_rows(self, rows: Tensor) -> "Segment":
        """The same queries against some rows of the key."""
        bias = None if self.key_bias is None else self.key_bias[:, rows]
        return self._replace(key=self.key[:, rows], key_bias=bias)


def attend_in_windows(
    segments: Sequence[Segment],
    value: Tensor,
    op: AttendOp,
    *,
    feat_size: Size2,
    window_size: Size2,
    num_prefix_tokens: int,
    mask_diagonal: bool,
) -> Tensor:
    """Tile the map with windows of the grid the keys were built for; prefix tokens see, and are seen by, all.

    Args:
        segments: Queries of all tokens on ``feat_size``, in token order, with their keys for ``window_size``.
        value: (B, h, P + H*W, d).
        op: The attention.
        feat_size: The map (H, W).
        window_size: The window, the grid of the keys.
        num_prefix_tokens: P.
        mask_diagonal: Whether the op hides a token from itself.

    Returns:
        (B, h, P + H*W, d).

    Raises:
        FeatSizeError: A window of one token is left with nothing to attend to.
    """
    batch = value.shape[0]
    prefix_rows = torch.arange(num_prefix_tokens, device=value.device)
    out = []
    for segment in segments:
        num_prefix_queries = max(num_prefix_tokens - segment.first_token, 0)
        if num_prefix_queries:
            y, x = (torch.arange(extent, device=value.device) for extent in feat_size)
            tiled = (y % window_size[0]).unsqueeze(1) * window_size[1] + x % window_size[1]
            rows = torch.cat([prefix_rows, num_prefix_tokens + tiled.flatten()])
            prefix = segment.with_key_rows(rows)._replace(query=segment.query[:, :, :num_prefix_queries])
            out.append(prefix.attend(op, value))
        if num_prefix_queries == segment.query.shape[2]:
            continue
        kernel_size = 1 if segment.unfold is None else segment.unfold[1]  # neighbourhoods reach beyond the window
        grid_queries = segment.query[:, :, num_prefix_queries:]
        queries = window_partition(grid_queries, feat_size, window_size, border=kernel_size // 2)
        values = window_partition(value[:, :, num_prefix_tokens:], feat_size, window_size)
        parts = []
        for (shape, query), (_, window_value) in zip(queries, values, strict=True):
            covered = window_key_rows(window_size, shape, value.device)
            rows = torch.cat([prefix_rows, num_prefix_tokens + covered])
            if mask_diagonal and len(rows) < 2:
                raise FeatSizeError(
                    f"windows of {window_size} leave one of a single token on feat_size={feat_size}, which "
                    "mask_diagonal=True leaves nothing to attend to; use a multiple of the window"
                )
            if num_prefix_tokens:
                num_windows = window_value.shape[0] // batch if batch else 0
                shared = value[:, :, :num_prefix_tokens].repeat_interleave(num_windows, dim=0)
                window_value = torch.cat([shared, window_value], dim=2)
            unfold = None if segment.unfold is None else (shape, kernel_size)
            part = segment.with_key_rows(rows)._replace(query=query, first_token=num_prefix_tokens, unfold=unfold)
            parts.append(part.attend(op, window_value))
        out.append(window_merge(parts, feat_size, window_size))
    return torch.cat(out, dim=2)


def num_window_logits(feat_size: Size2, window_size: Size2, num_prefix_tokens: int) -> int:
    """Logits per head that grid queries make in windows, which are cut at the border."""
    rows, cols = (
        [min(window, extent - start) for start in range(0, extent, window)]
        for extent, window in zip(feat_size, window_size, strict=True)
    )
    return sum(height * width * (height * width + num_prefix_tokens) for height in rows for width in cols)
