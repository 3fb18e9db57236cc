"""Naive twins of the ops: one obvious loop or einsum each, the oracle of the tests and of the benchmarks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._typing import Size2


def static_key_attention(
    query: Tensor,
    static_key: Tensor,
    value: Tensor,
    *,
    key_bias: Tensor | None = None,
    scale: float | Tensor | None = None,
    mask_diagonal: bool = False,
    query_offset: int = 0,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """The op, token by token; arguments and shapes as ``statickey.ops.static_key_attention``."""
    num_queries, width = query.shape[2:]
    factor = width**-0.5 if scale is None else scale
    rows = []
    for i in range(num_queries):
        logits = torch.einsum("bhd,hmd->bhm", query[:, :, i], static_key)
        if key_bias is not None:
            logits = logits + key_bias
        logits = logits * factor
        if attn_mask is not None:
            mask = attn_mask.expand(*query.shape[:3], -1)[:, :, i]
            logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
        if mask_diagonal:
            logits = logits.masked_fill(torch.arange(logits.shape[-1]) == i + query_offset, float("-inf"))
        empty = logits.isneginf().all(dim=-1, keepdim=True)
        weights = logits.masked_fill(empty, 0.0).softmax(dim=-1).masked_fill(empty, 0.0)
        rows.append(torch.einsum("bhm,bhmd->bhd", weights, value))
    return torch.stack(rows, dim=2)


def conv_static_key_attention(
    query: Tensor,
    conv_key: Tensor,
    conv_bias: Tensor | None,
    value: Tensor,
    *,
    feat_size: Size2,
    scale: float | Tensor,
) -> Tensor:
    """CSKA as the paper writes it: a grouped convolution over the query map, softmax, product.

    Args:
        query: (B, h, H*W, d), row-major.
        conv_key: (h, M, d, k, k).
        conv_bias: (h, M) or None.
        value: (B, h, M, dv).
        feat_size: The grid (H, W).
        scale: Factor on the logits, bias included.

    Returns:
        (B, h, H*W, dv).
    """
    batch, heads, num_tokens, width = query.shape
    num_keys, kernel_size = conv_key.shape[1], conv_key.shape[-1]
    maps = query.transpose(2, 3).reshape(batch, heads * width, *feat_size)
    bias = None if conv_bias is None else conv_bias.flatten()
    logits = F.conv2d(maps, conv_key.flatten(0, 1), bias, padding=kernel_size // 2, groups=heads)
    logits = logits.reshape(batch, heads, num_keys, num_tokens).transpose(2, 3)
    return (logits * scale).softmax(dim=-1) @ value


def unfold_queries(query: Tensor, feat_size: Size2, kernel_size: int) -> Tensor:
    """Neighbourhoods, cell by cell; arguments and shapes as ``statickey.ops.unfold_queries``."""
    batch, heads, num_tokens, width = query.shape
    height, length = feat_size
    pad = kernel_size // 2
    out = query.new_zeros(batch, heads, num_tokens, kernel_size, kernel_size, width)
    for i in range(num_tokens):
        for row in range(kernel_size):
            for col in range(kernel_size):
                y, x = i // length + row - pad, i % length + col - pad
                if 0 <= y < height and 0 <= x < length:
                    out[:, :, i, row, col] = query[:, :, y * length + x]
    return out.flatten(3)


def resample_static_key(
    static_key: Tensor, feat_size: Size2, new_feat_size: Size2, *, num_prefix_tokens: int = 0
) -> Tensor:
    """Resampling, one channel at a time; as ``statickey.ops.resample_static_key``."""
    out = []
    for head in static_key.flatten(2):
        prefix, grid = head[:num_prefix_tokens], head[num_prefix_tokens:]
        planes = [
            F.interpolate(
                grid[:, c].reshape(1, 1, *feat_size), size=new_feat_size, mode="bicubic", antialias=True
            ).flatten()
            for c in range(grid.shape[1])
        ]
        out.append(torch.cat([prefix, torch.stack(planes, dim=1)]))
    return torch.stack(out).reshape(static_key.shape[0], -1, *static_key.shape[2:])


def window_static_key_attention(
    query: Tensor, static_key: Tensor, value: Tensor, *, feat_size: Size2, window_size: Size2, scale: float
) -> Tensor:
    """Windowed attention by masking: a query sees the tokens of its own window only.

    Args:
        query: (B, h, H*W, d).
        static_key: (h, wh*ww, d).
        value: (B, h, H*W, dv).
        feat_size: The map (H, W).
        window_size: The window (wh, ww) the key was built for.
        scale: Factor on the logits.

    Returns:
        (B, h, H*W, dv).
    """
    height, width = feat_size
    window_height, window_width = window_size
    y, x = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    window = (y // window_height) * width + x // window_width
    row = (y % window_height) * window_width + x % window_width
    logits = torch.einsum("bhnd,hmd->bhnm", query, static_key[:, row]) * scale
    logits = logits.masked_fill(window.unsqueeze(1) != window, float("-inf"))
    return logits.softmax(dim=-1) @ value


def pool_cells(tokens: Tensor, feat_size: Size2, key_size: Size2, *, num_prefix_tokens: int = 0) -> Tensor:
    """Means over cells, cell by cell; arguments and shapes as ``statickey.ops.pool_cells``."""
    grid = tokens[:, num_prefix_tokens:].reshape(len(tokens), *feat_size, -1)
    ys, xs = (
        [[i for i in range(extent) if int((i + 0.5) / extent * cells) == cell] for cell in range(cells)]
        for extent, cells in zip(feat_size, key_size, strict=True)
    )
    means = [grid[:, y][:, :, x].mean((1, 2)) for y in ys for x in xs]
    return torch.cat([tokens[:, :num_prefix_tokens], torch.stack(means, dim=1)], dim=1)


def rotate(x: Tensor, angles: Tensor, *, half: bool, num_prefix_tokens: int) -> Tensor:
    """Rotary embedding, pair by pair as complex numbers; ``angles`` (..., N, d/2), one for each pair."""
    width = x.shape[-1]
    out = x.clone()
    for pair in range(width // 2):
        a, b = (pair, pair + width // 2) if half else (2 * pair, 2 * pair + 1)
        for token in range(num_prefix_tokens, x.shape[-2]):
            number = torch.complex(x[..., token, a], x[..., token, b])
            angle = angles[..., token - num_prefix_tokens, pair]
            number = number * torch.complex(angle.cos(), angle.sin())
            out[..., token, a], out[..., token, b] = number.real, number.imag
    return out
