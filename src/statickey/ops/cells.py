"""A coarser grid laid over a map of tokens: which cell a token is in, tokens averaged over cells, keys repeated."""

import torch
from torch import Tensor

from .._checks import check_feat_size
from .._typing import Size2
from ..errors import FeatSizeError


def pool_cells(tokens: Tensor, feat_size: Size2, key_size: Size2, *, num_prefix_tokens: int = 0) -> Tensor:
    """Average the tokens of a map over the cells of a coarser grid.

    Along each axis a token belongs to the cell that its centre lies in, so every token is in one cell and the sizes
    of cells differ by at most one row and one column.

    Args:
        tokens: (B, P + H*W, C), row-major, prefix first.
        feat_size: The map (H, W).
        key_size: The cells (h', w'), at most (H, W).
        num_prefix_tokens: P, tokens that have no place on the grid; they are passed through.

    Returns:
        (B, P + h'*w', C); the tokens themselves when the grids are the same.

    Raises:
        FeatSizeError: The tokens do not fill the map, or the cells are finer than it.
    """
    (height, width), (rows, cols) = _check_cells(feat_size, key_size)
    batch, num_tokens, channels = tokens.shape
    if num_tokens != num_prefix_tokens + height * width:
        raise FeatSizeError(
            f"{num_tokens} tokens do not fill feat_size={feat_size} with {num_prefix_tokens} prefix tokens"
        )
    if (height, width) == (rows, cols):
        return tokens
    # two thin products, one an axis, cost less than a strided mean and take uneven cells as they are
    lines = _means(tokens[:, num_prefix_tokens:].reshape(batch, height, width * channels), rows)
    cells = _means(lines.reshape(batch, rows, width, channels), cols).flatten(1, 2)
    return torch.cat([tokens[:, :num_prefix_tokens], cells], dim=1) if num_prefix_tokens else cells


def repeat_cells(static_key: Tensor, key_size: Size2, feat_size: Size2, *, num_prefix_tokens: int = 0) -> Tensor:
    """Give every token of a map the key of its cell.

    Args:
        static_key: (h, P + h'*w', ...), prefix rows first; any trailing axes.
        key_size: The cells (h', w'), at most (H, W).
        feat_size: The map (H, W).
        num_prefix_tokens: P.

    Returns:
        (h, P + H*W, ...); the key itself when the grids are the same.

    Raises:
        FeatSizeError: The cells are finer than the map.
    """
    (height, width), (rows, cols) = _check_cells(feat_size, key_size)
    if (height, width) == (rows, cols):
        return static_key
    row = _cells_of(height, rows, static_key.device)
    col = _cells_of(width, cols, static_key.device)
    index = num_prefix_tokens + (row.unsqueeze(1) * cols + col).flatten()
    return static_key[:, torch.cat([torch.arange(num_prefix_tokens, device=static_key.device), index])]


def cell_sizes(
    feat_size: Size2, key_size: Size2, *, num_prefix_tokens: int = 0, device: torch.device | None = None
) -> Tensor | None:
    """How many tokens each key of a coarser grid stands for; one for a prefix token.

    Args:
        feat_size: The map (H, W).
        key_size: The cells (h', w'), at most (H, W).
        num_prefix_tokens: P.
        device: Where to make them.

    Returns:
        (P + h'*w',), float32; None where all are equal, which a softmax does not see.

    Raises:
        FeatSizeError: The cells are finer than the map.
    """
    (height, width), (rows, cols) = _check_cells(feat_size, key_size)
    even = height % rows == 0 and width % cols == 0
    if even and (num_prefix_tokens == 0 or (height, width) == (rows, cols)):
        return None
    per_row, per_col = _members(height, rows, device).sum(1), _members(width, cols, device).sum(1)
    sizes = (per_row.unsqueeze(1) * per_col).flatten()
    return torch.cat([sizes.new_ones(num_prefix_tokens), sizes]).float()


def pooling_macs(feat_size: Size2, key_size: Size2, channels: int) -> int:
    """Multiply-accumulates of ``pool_cells`` for one image."""
    (height, width), (rows, cols) = feat_size, key_size
    return 0 if feat_size == key_size else rows * width * channels * (height + cols)


def _check_cells(feat_size: Size2, key_size: Size2) -> tuple[Size2, Size2]:
    feat_size, key_size = check_feat_size(feat_size), check_feat_size(key_size, "key_size")
    if key_size[0] > feat_size[0] or key_size[1] > feat_size[1]:
        raise FeatSizeError(f"key_size={key_size} is finer than the map, feat_size={feat_size}")
    return feat_size, key_size


def _cells_of(extent: int, cells: int, device: torch.device | None) -> Tensor:
    """The cell that the centre of each token lies in, along one axis, (extent,)."""
    return (2 * torch.arange(extent, device=device) + 1) * cells // (2 * extent)


def _members(extent: int, cells: int, device: torch.device | None) -> Tensor:
    """Which tokens each cell holds along one axis, (cells, extent)."""
    return _cells_of(extent, cells, device) == torch.arange(cells, device=device).unsqueeze(1)


def _means(tokens: Tensor, cells: int) -> Tensor:
    """Means over cells of the last axis but one; sums come first, since ones are exact in any dtype."""
    members = _members(tokens.shape[-2], cells, tokens.device)
    return (members.to(tokens.dtype) @ tokens) / members.sum(1, keepdim=True)
