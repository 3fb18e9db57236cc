"""Operations on the token grid: neighbourhoods of queries, keys for another grid, windows."""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_feat_size, check_kernel_size, check_rank
from .._typing import Size2
from ..errors import FeatSizeError


def unfold_queries(query: Tensor, feat_size: Size2, kernel_size: int) -> Tensor:
    """Gather the zero-padded neighbourhood of every query, in the order of a channels-last convolution's weight.

    With ``weight`` (M, d, k, k) of a convolution, ``unfold_queries(q) @ weight.permute(0, 2, 3, 1).flatten(1).T``
    is that convolution of the query map: CSKA is static-key attention on unfolded queries.

    Args:
        query: Queries of the grid tokens, row-major, (B, h, H*W, d), or of the grid and a border of k//2 tokens
            around it, (B, h, (H+k-1)*(W+k-1), d), which are zeros otherwise.
        feat_size: The grid (H, W).
        kernel_size: Odd k.

    Returns:
        (B, h, H*W, d*k*k), head-major in memory; index ``(row*k + column)*d + c``, so that whole queries are copied.

    Raises:
        FeatSizeError: The queries do not fill the grid.
        StaticKeyError: The kernel size is not odd.
    """
    bordered = check_unfolding(query, feat_size, kernel_size)
    batch, heads, _, width = query.shape
    border = kernel_size // 2
    extents = [extent + 2 * border * bordered for extent in feat_size]
    # laid out head by head, as one product a head for the whole batch wants it
    grid = query.transpose(0, 1).reshape(heads, batch, *extents, width)
    if not bordered:
        grid = F.pad(grid, (0, 0, border, border, border, border))
    views = grid.unfold(2, kernel_size, 1).unfold(3, kernel_size, 1).permute(0, 1, 2, 3, 5, 6, 4)
    return views.reshape(heads, batch, prod(feat_size), kernel_size * kernel_size * width).transpose(0, 1)


def fold_queries(unfolded: Tensor, feat_size: Size2, kernel_size: int, *, bordered: bool = False) -> Tensor:
    """The adjoint of ``unfold_queries``: add every query's parts up from the neighbourhoods it is in.

    Args:
        unfolded: (..., H*W, k*k*d), as ``unfold_queries`` lays them out.
        feat_size: The grid (H, W).
        kernel_size: Odd k.
        bordered: Whether the queries came with a border.

    Returns:
        (..., H*W, d), or (..., (H+k-1)*(W+k-1), d) with the border.
    """
    (height, width), border = feat_size, kernel_size // 2
    parts = unfolded.reshape(*unfolded.shape[:-2], height, width, kernel_size, -1)
    lines = parts.new_zeros(*parts.shape[:-4], height + 2 * border, width, parts.shape[-1])
    for row in range(kernel_size):
        lines[..., row : row + height, :, :] += parts[..., row, :]
    lines = lines.reshape(*lines.shape[:-1], kernel_size, -1)
    grid = parts.new_zeros(*lines.shape[:-3], width + 2 * border, lines.shape[-1])
    for column in range(kernel_size):
        grid[..., column : column + width, :] += lines[..., column, :]
    if not bordered:
        grid = grid[..., border : border + height, border : border + width, :]
    return grid.flatten(-3, -2)


def check_unfolding(query: Tensor, feat_size: Size2, kernel_size: int) -> bool:
    """Whether the queries bring the border of the grid; those that do not fill it are refused."""
    check_kernel_size(kernel_size)
    check_rank("query", query, "B h N d")
    height, width = check_feat_size(feat_size)
    bordered = (height + kernel_size - 1) * (width + kernel_size - 1)
    if query.shape[2] not in (height * width, bordered):
        raise FeatSizeError(
            f"query has {query.shape[2]} tokens, feat_size={feat_size} makes {height * width}, "
            f"or {bordered} with a border for kernel_size={kernel_size}"
        )
    return query.shape[2] != height * width


def resample_static_key(
    static_key: Tensor, feat_size: Size2, new_feat_size: Size2, *, num_prefix_tokens: int = 0
) -> Tensor:
    """Resample a static key to another grid, bicubic over the grid axes (antialiased when it shrinks).

    Args:
        static_key: (h, P + H*W, ...), prefix rows first; any trailing axes (a convolution key has three).
        feat_size: The grid (H, W) the key was built for.
        new_feat_size: The grid (H', W') wanted.
        num_prefix_tokens: P, rows that have no place on the grid; they are passed through.

    Returns:
        (h, P + H'*W', ...) in the key's dtype; the key itself when the grid is the same.

    Raises:
        FeatSizeError: The key has another number of rows than the grid it is said to be built for.
    """
    height, width = check_feat_size(feat_size)
    new_height, new_width = check_feat_size(new_feat_size)
    if static_key.shape[1] != num_prefix_tokens + height * width:
        raise FeatSizeError(
            f"static_key has {static_key.shape[1]} rows, but feat_size={feat_size} with "
            f"{num_prefix_tokens} prefix tokens makes {num_prefix_tokens + height * width}"
        )
    symbolic = isinstance(new_height, torch.SymInt) or isinstance(new_width, torch.SymInt)
    if not symbolic and (height, width) == (new_height, new_width):  # an exported model must not depend on the answer
        return static_key
    heads, trailing = static_key.shape[0], static_key.shape[2:]
    prefix, grid = static_key[:, :num_prefix_tokens], static_key[:, num_prefix_tokens:]
    grid = grid.reshape(heads, height, width, -1).permute(0, 3, 1, 2)
    grid = grid.to(torch.promote_types(grid.dtype, torch.float32))
    grid = F.interpolate(grid, size=(new_height, new_width), mode="bicubic", antialias=True, align_corners=False)
    grid = grid.permute(0, 2, 3, 1).reshape(heads, new_height * new_width, *trailing)
    return torch.cat([prefix, grid.to(static_key.dtype)], dim=1)


def window_partition(
    tokens: Tensor, feat_size: Size2, window_size: Size2, *, border: int = 0
) -> list[tuple[Size2, Tensor]]:
    """Tile a token map with windows that start at its top left corner.

    Where the windows do not divide the map, those at the right and bottom border are smaller. Windows of one
    shape come together, so there are at most four groups and nothing is padded: attention with the key rows
    of the smaller shape equals attention on a padded window whose padding is masked.

    Args:
        tokens: Row-major tokens of the map, (B, h, H*W, d).
        feat_size: The map (H, W).
        window_size: The window (wh, ww).
        border: Tokens around a window that come with it, from its neighbours, or zeros around the map.

    Returns:
        A list of ``((rows, cols), (B*n, h, rows*cols, d))``: interior, right border, bottom border, corner,
        those that exist; n windows of that shape per image, row-major. With a border it is
        ``(B*n, h, (rows + 2*border)*(cols + 2*border), d)``.

    Raises:
        FeatSizeError: The tokens do not fill the map.
    """
    check_rank("tokens", tokens, "B h N d")
    height, width = check_feat_size(feat_size)
    batch, heads, num_tokens, dim = tokens.shape
    if num_tokens != height * width:
        raise FeatSizeError(f"{num_tokens} tokens do not fill feat_size={feat_size}")
    around = 2 * border
    grid = tokens.reshape(batch, heads, height, width, dim)
    if border:
        grid = F.pad(grid, (0, 0, border, border, border, border))
    groups = []
    for (top, rows, num_rows), (left, cols, num_cols) in _bands(feat_size, window_size):
        part = grid[:, :, top : top + rows * num_rows + around, left : left + cols * num_cols + around]
        part = part.unfold(2, rows + around, rows).unfold(3, cols + around, cols).permute(0, 2, 3, 1, 5, 6, 4)
        groups.append(
            ((rows, cols), part.reshape(batch * num_rows * num_cols, heads, (rows + around) * (cols + around), dim))
        )
    return groups


def window_merge(windows: list[Tensor], feat_size: Size2, window_size: Size2) -> Tensor:
    """Undo ``window_partition``.

    Args:
        windows: The tensors of its groups, in its order, each (B*n, h, rows*cols, d).
        feat_size: The map (H, W).
        window_size: The window (wh, ww).

    Returns:
        Row-major tokens of the map, (B, h, H*W, d).
    """
    height, width = check_feat_size(feat_size)
    bands = _bands(feat_size, window_size)
    lines: list[Tensor] = []
    line: list[Tensor] = []
    for part, ((_, rows, num_rows), (left, cols, num_cols)) in zip(windows, bands, strict=True):
        heads, dim = part.shape[1], part.shape[3]
        batch = part.shape[0] // (num_rows * num_cols)
        part = part.reshape(batch, num_rows, num_cols, heads, rows, cols, dim).permute(0, 3, 1, 4, 2, 5, 6)
        line.append(part.reshape(part.shape[0], heads, num_rows * rows, num_cols * cols, dim))
        if left + cols * num_cols == width:
            lines.append(torch.cat(line, dim=3))
            line = []
    grid = torch.cat(lines, dim=2)
    return grid.reshape(grid.shape[0], grid.shape[1], height * width, grid.shape[4])


def window_key_rows(window_size: Size2, part_size: Size2, device: torch.device | None = None) -> Tensor:
    """Indices of the key rows that a smaller window at the border still covers.

    Args:
        window_size: The window (wh, ww) the key is built for.
        part_size: The smaller window (rows, cols), from ``window_partition``.
        device: Where to make the indices.

    Returns:
        (rows*cols,), row-major.
    """
    rows = torch.arange(part_size[0], device=device).unsqueeze(1) * window_size[1]
    return (rows + torch.arange(part_size[1], device=device)).flatten()


_Band = tuple[int, int, int]


def _bands(feat_size: Size2, window_size: Size2) -> list[tuple[_Band, _Band]]:
    """Row and column bands of equal windows: (first token, window extent, number of windows)."""
    window_height, window_width = check_feat_size(window_size)
    rows, cols = _axis_bands(feat_size[0], window_height), _axis_bands(feat_size[1], window_width)
    return [(row, col) for row in rows for col in cols]


def _axis_bands(extent: int, window: int) -> list[_Band]:
    """The bands along one axis; neither a closure nor divmod, which torch.compile would not enter."""
    whole, rest = extent // window, extent % window
    bands = [(0, window, whole)] if whole else []
    return bands + ([(whole * window, rest, 1)] if rest else [])
