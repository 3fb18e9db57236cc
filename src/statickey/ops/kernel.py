"""Attention on a static key in one Triton kernel, for CUDA. One shape has been measured, so no default uses it."""

from __future__ import annotations  # annotations name triton's types, which may be missing

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._typing import Size2
from .recompute import recomputed_gradients

try:
    import triton
    import triton.language as tl
except ImportError:  # not available for macOS and Windows
    triton = None

INSTALLED = triton is not None
"""Whether there is a kernel."""


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    scale: float | Tensor,
    query_offset: int | None,
    unfold: tuple[Size2, int] | None,
    recompute: Callable[..., Tensor],
) -> Tensor:
    """Compute ``softmax(scale * (query @ key^T + key_bias)) @ value`` without the map and the unfolded query.

    Backward has no kernel: it recomputes both, whole, through ``recompute``.

    Args:
        query: (B, h, N, d), any strides; with ``unfold``, what ``unfold_queries`` takes.
        key: (h, M, k*k*d).
        value: (B, h, M, dv), any strides.
        key_bias: (h, M).
        scale: A number or a 0-dim tensor.
        query_offset: If not None, query i does not attend to key ``i + query_offset``.
        unfold: ``(feat_size, kernel_size)`` to attend with unfolded queries.
        recompute: The same function in torch's operations, of ``(query, key, value, key_bias=, scale=)``.

    Returns:
        (B, h, N, dv), token-major in memory, as the output projection reads it.

    Source:
        Online softmax: Dao et al., FlashAttention, arXiv 2205.14135.
    """
    if isinstance(scale, Tensor):
        scale = scale.to(query.device)
    out: Tensor = _FusedAttention.apply(recompute, query, key, value, key_bias, scale, query_offset, unfold)
    return out


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recompute: Callable[..., Tensor], *inputs: Any) -> Tensor:
        *tensors, scale, _, _ = inputs
        ctx.save_for_backward(*tensors, scale if isinstance(scale, Tensor) else None)
        ctx.scale, ctx.recompute = scale, recompute
        return _launch(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        def recompute(query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None, learned: Any) -> Tensor:
            scale = ctx.scale if learned is None else learned
            with torch.autocast(query.device.type, enabled=False):
                out: Tensor = ctx.recompute(query, key, value, key_bias=key_bias, scale=scale)
            return out

        grads = recomputed_gradients(recompute, ctx.saved_tensors, ctx.needs_input_grad[1:6], grad_out)
        return None, *grads, None, None


def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    scale: float | Tensor,
    query_offset: int | None,
    unfold: tuple[Size2, int] | None,
) -> Tensor:
    batch, heads, num_tokens, width = query.shape
    num_keys, value_width = value.shape[2:]
    (height, length), kernel_size = ((num_tokens, 1), 1) if unfold is None else unfold
    num_queries = height * length
    out = value.new_empty(batch, num_queries, heads, value_width)
    block = 32 if query.dtype == torch.float32 else 64  # compiled for float32, 64 spill registers
    block_value = min(128, _block_extent(value_width))
    grid = (-(-num_queries // block) * batch * heads, -(-value_width // block_value))
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        _KERNEL[grid](
            query,
            key.contiguous(),
            value,
            None if key_bias is None else key_bias.contiguous(),
            scale if isinstance(scale, Tensor) else None,
            out,
            1.0 if isinstance(scale, Tensor) else float(scale),
            batch,
            heads,
            height,
            length,
            num_keys,
            0 if query_offset is None else query_offset,
            *query.stride(),
            *value.stride(),
            width=width,
            value_width=value_width,
            kernel_size=kernel_size,
            border=kernel_size // 2 if num_tokens != num_queries else 0,
            mask_diagonal=query_offset is not None,
            block_queries=block,
            block_keys=block,
            block_width=min(64, _block_extent(width)),
            block_value=block_value,
            num_warps=4,
            num_stages=2,
        )
    return out.transpose(1, 2)


def _block_extent(extent: int) -> int:
    """The smallest power of two that covers the extent, at least 16 as matrix units want."""
    return max(16, 1 << (extent - 1).bit_length())


def _attend(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    key_bias: tl.tensor,
    learned: tl.tensor,
    out: tl.tensor,
    factor: tl.tensor,
    batch: tl.tensor,
    heads: tl.tensor,
    height: tl.tensor,
    length: tl.tensor,
    num_keys: tl.tensor,
    query_offset: tl.tensor,
    query_image: tl.tensor,
    query_head: tl.tensor,
    query_token: tl.tensor,
    query_channel: tl.tensor,
    value_image: tl.tensor,
    value_head: tl.tensor,
    value_token: tl.tensor,
    value_channel: tl.tensor,
    width: tl.constexpr,
    value_width: tl.constexpr,
    kernel_size: tl.constexpr,
    border: tl.constexpr,
    mask_diagonal: tl.constexpr,
    block_queries: tl.constexpr,
    block_keys: tl.constexpr,
    block_width: tl.constexpr,
    block_value: tl.constexpr,
) -> None:
    """A block of queries of one image and head, against all keys, a block of them at a time."""
    num_queries = height * length
    blocks = tl.cdiv(num_queries, block_queries)
    program = tl.program_id(0)  # heads are outermost: what runs together shares one head's key
    image = (program // blocks % batch).to(tl.int64)
    head = (program // (blocks * batch)).to(tl.int64)
    tokens = program % blocks * block_queries + tl.arange(0, block_queries)
    channels = tl.program_id(1) * block_value + tl.arange(0, block_value)
    parts: tl.constexpr = (width + block_width - 1) // block_width
    key_width: tl.constexpr = kernel_size * kernel_size * width
    query += image * query_image + head * query_head
    key += head * num_keys * key_width
    value += image * value_image + head * value_head
    scale = factor * 1.4426950408889634  # log2(e): powers of two are what the hardware has
    if learned is not None:
        scale *= tl.load(learned).to(tl.float32)
    highest = tl.full((block_queries,), float("-inf"), tl.float32)
    total = tl.full((block_queries,), 0.0, tl.float32)
    mixed = tl.full((block_queries, block_value), 0.0, tl.float32)
    for first in range(0, num_keys, block_keys):
        keys = first + tl.arange(0, block_keys)
        known = keys < num_keys
        logits = tl.full((block_queries, block_keys), 0.0, tl.float32)
        for step in range(kernel_size * kernel_size * parts):
            tap = step // parts
            row = tokens // length + tap // kernel_size - kernel_size // 2 + border
            column = tokens % length + tap % kernel_size - kernel_size // 2 + border
            on_grid = (row >= 0) & (row < height + 2 * border) & (column >= 0) & (column < length + 2 * border)
            shifted = row * (length + 2 * border) + column
            columns = step % parts * block_width + tl.arange(0, block_width)
            left = tl.load(
                query + shifted.to(tl.int64)[:, None] * query_token + columns[None, :] * query_channel,
                mask=on_grid[:, None] & (columns < width)[None, :],
                other=0.0,
            )
            slices = tl.load(
                key + keys[None, :] * key_width + (tap * width + columns)[:, None],
                mask=known[None, :] & (columns < width)[:, None],
                other=0.0,
            )
            logits = tl.dot(left, slices, logits, input_precision="ieee")
        if key_bias is not None:
            bias = tl.load(key_bias + head * num_keys + keys, mask=known, other=0.0)
            logits += bias.to(tl.float32)[None, :]
        logits = tl.where(known[None, :], logits * scale, float("-inf"))
        if mask_diagonal:
            logits = tl.where((tokens + query_offset)[:, None] == keys[None, :], float("-inf"), logits)
        higher = tl.maximum(highest, tl.max(logits, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a bias may hide all keys so far
        weights = tl.exp2(logits - base[:, None])
        decay = tl.exp2(highest - base)
        total = total * decay + tl.sum(weights, 1)
        values = tl.load(
            value + keys.to(tl.int64)[:, None] * value_token + channels[None, :] * value_channel,
            mask=known[:, None] & (channels < value_width)[None, :],
            other=0.0,
        )
        mixed = tl.dot(weights.to(values.dtype), values, mixed * decay[:, None], input_precision="ieee")
        highest = higher
    rows = ((image * num_queries + tokens) * heads + head) * value_width
    tl.store(
        out + rows[:, None] + channels[None, :],
        (mixed / total[:, None]).to(out.dtype.element_ty),
        mask=(tokens < num_queries)[:, None] & (channels < value_width)[None, :],
    )


_KERNEL: Any = triton.jit(_attend) if INSTALLED else None
INTERPRETED = INSTALLED and not isinstance(_KERNEL, triton.JITFunction)
"""Whether TRITON_INTERPRET=1 was set when triton was loaded: then the kernel runs on the CPU, slowly."""
