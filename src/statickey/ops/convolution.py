"""Attention on a static key without tiles, for maps of few tokens on the CPU: logits by torch's own convolution."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._typing import Size2
from . import tiles
from .grid import unfold_queries

UNFOLDED_TOKENS = 64
"""Most tokens of a batch for which unfolding them is faster than to start a convolution; never with gradients."""
KEPT_EXTENT = 8
"""Most tokens per channel of a head where the map is kept for backward, so many times as large as the query."""


def is_convolved(query: Tensor, key: Tensor, unfold: tuple[Size2, int]) -> bool:
    """Whether operations on whole images are faster than tiles of unfolded queries.

    Forward they are where the map of one image, (h, N, M), fits a tile; with gradients where N is also at most 8
    times the width of a head, which bounds the map that autograd keeps. With 256 channels and heads of 16 to 64:

    ======== ================== ==================
    grid     forward            forward, backward
    ======== ================== ==================
    4, 7, 8  convolved          convolved
    14, 16   convolved          from 32 channels on
    28, 32   tiles              tiles
    ======== ================== ==================

    Measured on two cores of an Intel Xeon with AVX-512, torch 2.15, batches of 1, 8 and 64: tiles took 1.1 to 3 times
    the plain convolution's time with 16 to 64 tokens, and up to 1.2 times with 196 and 256 tokens and wide heads.
    Only oneDNN has a fast grouped convolution, and only in float32.
    """
    if query.dtype != torch.float32 or not torch._C._has_mkldnn:
        return False
    num_tokens = unfold[0][0] * unfold[0][1]
    fits = num_tokens * key.shape[0] * key.shape[1] <= tiles.TILE_NUMEL
    return fits and (not torch.is_grad_enabled() or num_tokens <= KEPT_EXTENT * query.shape[-1])


def convolved_attention(
    query: Tensor, key: Tensor, key_bias: Tensor | None, value: Tensor, mask: Tensor | None, unfold: tuple[Size2, int]
) -> Tensor:
    """Compute ``tiled_attention`` of unfolded queries for as many images at a time as keep their map in the cache.

    All operations can be differentiated twice; autograd keeps the map.

    Returns:
        (B, h, N, dv).
    """
    (height, width), kernel_size = unfold
    batch, heads, num_tokens, dim = query.shape
    if batch * height * width <= UNFOLDED_TOKENS and not torch.is_grad_enabled():
        flat = unfold_queries(query, *unfold).transpose(0, 1).flatten(1, 2)
        logits = flat @ key.mT if key_bias is None else torch.baddbmm(key_bias.unsqueeze(1), flat, key.mT)
        return _weigh(logits.view(heads, batch, height * width, -1).transpose(0, 1), mask, value)
    border = kernel_size // 2 if num_tokens == height * width else 0
    extents = (height, width) if border else (height + kernel_size - 1, width + kernel_size - 1)
    # channels last, as tokens lie in memory and as the key is laid out: the logits come token by token
    maps = query.transpose(1, 2).reshape(batch, *extents, heads * dim).permute(0, 3, 1, 2)
    filters = key.reshape(-1, kernel_size, kernel_size, dim).permute(0, 3, 1, 2)
    bias = None if key_bias is None else key_bias.flatten()
    images = max(1, tiles.TILE_NUMEL // (heads * height * width * key.shape[1]))
    if images >= batch:
        return _attend(maps, filters, bias, value, mask, border)
    masks = [mask] * batch if mask is None or len(mask) == 1 else torch.split(mask, images)
    parts = zip(torch.split(maps, images), torch.split(value, images), masks, strict=False)
    return torch.cat([_attend(part, filters, bias, values, added, border) for part, values, added in parts])


def _attend(
    maps: Tensor, filters: Tensor, bias: Tensor | None, value: Tensor, mask: Tensor | None, border: int
) -> Tensor:
    """Attention of some images, their queries a map, (B, h*d, H, W); the key as filters, (h*M, d, k, k)."""
    heads, num_keys = value.shape[1:3]
    logits = F.conv2d(maps, filters, bias, padding=border, groups=heads)
    logits = logits.permute(0, 2, 3, 1).reshape(len(maps), -1, heads, num_keys).transpose(1, 2)
    return _weigh(logits, mask, value)


def _weigh(logits: Tensor, mask: Tensor | None, value: Tensor) -> Tensor:
    if mask is not None:
        logits = logits + mask
    return logits.softmax(-1) @ value
