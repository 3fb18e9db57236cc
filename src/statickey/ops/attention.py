"""Attention against a key that does not depend on the input: the one formula of the package."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_backend, check_static_key_attention
from .._typing import Backend


def static_key_attention(
    query: Tensor,
    static_key: Tensor,
    value: Tensor,
    *,
    key_bias: Tensor | None = None,
    scale: float | Tensor | None = None,
    mask_diagonal: bool = False,
    query_offset: int = 0,
    dropout_p: float = 0.0,
    backend: Backend = "sdpa",
) -> Tensor:
    """Compute ``softmax(scale * (query @ static_key^T + key_bias)) @ value``.

    SKA, CSKA, the factorised CSKA and self-attention are all this function: they differ in where the key
    comes from and in how wide the query is (CSKA passes the unfolded query, see ``unfold_queries``).

    Args:
        query: Queries, (B, h, N, dk).
        static_key: Keys shared by the batch, (h, M, dk). A dynamic key, (B, h, M, dk), gives self-attention.
        value: Values, (B, h, M, dv); dv may differ from dk.
        key_bias: Added to every query's logit of a key, (h, M).
        scale: Factor on the logits, bias included; a 0-dim tensor when learned. Default ``dk ** -0.5``.
        mask_diagonal: If true, query i does not attend to key ``i + query_offset``.
        query_offset: Index of the first query among the keys' tokens; only used by ``mask_diagonal``.
        dropout_p: Dropout rate on the attention weights.
        backend: ``"sdpa"`` runs torch's fused attention, which does not store the N x M map where its
            kernel allows (not with dropout on the CPU); ``"math"`` always stores it.

    Returns:
        (B, h, N, dv), in the dtype of the inputs.

    Raises:
        StaticKeyError: Shapes or dtypes do not fit together.
        BackendError: The backend does not exist.

    Source:
        Hu, Zhou, Rostami, Static Key Attention in Vision, arXiv 2412.07049.
    """
    check_backend(backend, _BACKENDS)
    check_static_key_attention(query, static_key, value, key_bias, mask_diagonal, query_offset)
    query, key_bias, factor = _apply_scale(query, key_bias, scale)
    run = _BACKENDS[backend]
    return run(query, static_key, value, key_bias, factor, mask_diagonal, query_offset, dropout_p)


def static_key_weights(
    query: Tensor,
    static_key: Tensor,
    *,
    key_bias: Tensor | None = None,
    scale: float | Tensor | None = None,
    mask_diagonal: bool = False,
    query_offset: int = 0,
) -> Tensor:
    """Compute the attention map ``softmax(scale * (query @ static_key^T + key_bias))``.

    Args:
        query: Queries, (B, h, N, dk).
        static_key: Keys, (h, M, dk), or (B, h, M, dk).
        key_bias: Added to every query's logit of a key, (h, M).
        scale: Factor on the logits, bias included. Default ``dk ** -0.5``.
        mask_diagonal: If true, query i does not attend to key ``i + query_offset``.
        query_offset: Index of the first query among the keys' tokens.

    Returns:
        Weights that sum to one over the last axis, (B, h, N, M), in the dtype of the query.

    Raises:
        StaticKeyError: Shapes or dtypes do not fit together.
    """
    check_static_key_attention(query, static_key, None, key_bias, mask_diagonal, query_offset)
    query, key_bias, factor = _apply_scale(query, key_bias, scale)
    return _weights(query, static_key, key_bias, factor, mask_diagonal, query_offset)


def _apply_scale(
    query: Tensor, key_bias: Tensor | None, scale: float | Tensor | None
) -> tuple[Tensor, Tensor | None, float]:
    """Fold a learned scale into query and bias; keep a plain one as the kernel's own factor."""
    if scale is None:
        scale = query.shape[-1] ** -0.5
    if key_bias is not None:
        key_bias = key_bias * scale
    if isinstance(scale, Tensor):
        return query * scale.to(query.dtype), key_bias, 1.0
    return query, key_bias, scale


def _mask(
    query: Tensor, num_keys: int, key_bias: Tensor | None, mask_diagonal: bool, query_offset: int
) -> Tensor | None:
    """The additive mask of bias and diagonal: None, (h, 1, M), (N, M) or (h, N, M)."""
    mask = None if key_bias is None else key_bias.to(query.dtype).unsqueeze(1)
    if mask_diagonal:
        num_queries = query.shape[2]
        own = torch.arange(num_queries, device=query.device).unsqueeze(1) + query_offset
        hidden = own == torch.arange(num_keys, device=query.device)
        diagonal = torch.zeros(num_queries, num_keys, dtype=query.dtype, device=query.device)
        diagonal = diagonal.masked_fill(hidden, float("-inf"))
        mask = diagonal if mask is None else mask + diagonal
    return mask


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    scale: float,
    mask_diagonal: bool,
    query_offset: int,
    dropout_p: float,
) -> Tensor:
    batch, heads, num_queries, key_width = query.shape
    num_keys, value_width = value.shape[-2:]
    if key.ndim == 3:
        key = key.expand(batch, -1, -1, -1)
    # fused kernels want one width for all three: pad the narrower side with zeros, which changes no sum
    if value_width < key_width:
        value = F.pad(value, (0, key_width - value_width))
    elif value_width > key_width:
        query = F.pad(query, (0, value_width - key_width))
        key = F.pad(key, (0, value_width - key_width))
    mask = _mask(query, num_keys, key_bias, mask_diagonal, query_offset)
    if mask is not None:
        mask = mask.expand(batch, heads, num_queries, num_keys)
    out = F.scaled_dot_product_attention(query, key, value, mask, dropout_p, scale=scale)
    return out[..., :value_width]


def _math(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    scale: float,
    mask_diagonal: bool,
    query_offset: int,
    dropout_p: float,
) -> Tensor:
    weights = _weights(query, key, key_bias, scale, mask_diagonal, query_offset)
    return F.dropout(weights, dropout_p) @ value


def _weights(
    query: Tensor, key: Tensor, key_bias: Tensor | None, scale: float, mask_diagonal: bool, query_offset: int
) -> Tensor:
    dtype = query.dtype
    # half-precision logits overflow for large keys: scores and softmax are taken in float32
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        logits = (query.to(wide) * scale) @ key.to(wide).transpose(-2, -1)
        mask = _mask(query, key.shape[-2], key_bias, mask_diagonal, query_offset)
        if mask is not None:
            logits = logits + mask
        return logits.softmax(dim=-1).to(dtype)


_BACKENDS = {"sdpa": _sdpa, "math": _math}
