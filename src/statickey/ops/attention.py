"""Attention against a key that does not depend on the input: the one formula of the package."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import _C, Tensor
from torch.autograd import forward_ad

from .._checks import check_backend, check_rate, check_static_key_attention, check_triton
from .._typing import Backend, Size2
from .convolution import convolved_attention, is_convolved
from .grid import check_unfolding, unfold_queries
from .tiles import tiled_attention

_BACKENDS: tuple[str, ...] = get_args(Backend)


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
    key_count: Tensor | None = None,
    dropout_p: float = 0.0,
    unfold: tuple[Size2, int] | None = None,
    backend: Backend = "sdpa",
) -> Tensor:
    """Compute ``softmax(scale * (query @ static_key^T + key_bias) + attn_mask) @ value``.

    SKA, CSKA, the factorised CSKA and self-attention are all this function: they differ in where the key
    comes from and in how wide the query is (CSKA's is the unfolded query, see ``unfold``).

    Args:
        query: Queries, (B, h, N, dk); with ``unfold``, what ``unfold_queries`` takes, dk being ``d * k * k``.
        static_key: Keys shared by the batch, (h, M, dk). A dynamic key, (B, h, M, dk), gives self-attention.
        value: Values, (B, h, M, dv); dv may differ from dk.
        key_bias: Added to every query's logit of a key, (h, M).
        scale: Factor on the logits, bias included; a 0-dim tensor when learned. Default ``dk ** -0.5``.
        mask_diagonal: If true, query i does not attend to key ``i + query_offset``.
        query_offset: Index of the first query among the keys' tokens; only used by ``mask_diagonal``.
        attn_mask: Added to the logits after scaling, or, if boolean, true where attention is allowed; broadcasts
            to (B, h, N, M). A position bias that is learned, for example. A row in which it allows nothing gives
            zeros, and gets a gradient of zero, whatever the backend.
        key_count: How many equal keys each one stands for, (M,), positive: its logarithm is added to the scaled
            logits, so that with the mean of their values the result is that of all those keys. It gets no gradient.
            Its values are not checked, which a GPU would have to wait for: zero hides a key, a negative one is NaN.
        dropout_p: Dropout rate on the attention weights.
        unfold: ``(feat_size, kernel_size)`` to attend with ``unfold_queries(query, feat_size, kernel_size)``, which
            is then not stored where the backend does not need it; N is the number of unfolded queries.
        backend: ``"sdpa"`` runs torch's fused attention, or on the CPU, where the static key is wider than the
            value, products for the whole batch a tile of the map at a time, or a convolution where ``unfold`` is
            given and the map is small (see ``ops.convolution``); neither stores a large N x M map (except with
            dropout on the CPU). ``"math"`` always stores it. ``"triton"``, on CUDA in float32, bfloat16
            or float16, runs a kernel that stores neither the map nor the unfolded query; backward recomputes both,
            whole, as ``"math"`` does. In the one shape measured, on an H200, it wins for CSKA, whose unfolded
            queries are too wide for torch's fused attention, and loses elsewhere. It takes no dynamic key, no
            ``attn_mask`` and no dropout, and does not run under ``torch.compile``, ``torch.export`` or
            ``torch.func``. All have second derivatives except torch's fused attention, which raises where it has
            none.

    Returns:
        (B, h, N, dv), in the dtype of the inputs.

    Raises:
        StaticKeyError: Shapes, dtypes or devices do not fit together, or the scale is not finite.
        BackendError: The backend does not exist, or cannot run on these inputs.

    Source:
        Hu, Zhou, Rostami, Static Key Attention in Vision, arXiv 2412.07049.
    """
    check_backend(backend, _BACKENDS)
    check_rate(dropout_p=dropout_p)
    shape: Sequence[int] = query.shape
    if unfold is not None:
        check_unfolding(query, *unfold)
        feat_size, kernel_size = unfold
        shape = (shape[0], shape[1], feat_size[0] * feat_size[1], shape[3] * kernel_size**2)
    check_static_key_attention(
        query, static_key, value, key_bias, scale, mask_diagonal, query_offset, attn_mask, key_count, shape
    )
    scale = static_key.shape[-1] ** -0.5 if scale is None else scale
    if backend == "triton":
        from . import kernel  # imported late: a triton that fails to load must not break the other backends

        traced = _is_traced(query)
        check_triton(query, static_key, attn_mask, dropout_p, traced, kernel.INSTALLED, kernel.INTERPRETED)
        if key_count is not None:
            count_bias = (_log_count(key_count, query) / scale).to(query.dtype).expand(static_key.shape[0], -1)
            key_bias = count_bias if key_bias is None else key_bias + count_bias
        own = query_offset if mask_diagonal else None
        hidden: dict[str, Any] = {"mask_diagonal": mask_diagonal, "query_offset": query_offset}
        recompute = partial(static_key_attention, **hidden, unfold=unfold, backend="math")
        return kernel.fused_attention(query, static_key, value, key_bias, scale, own, unfold, recompute)
    mask, empty = _mask(query, shape[2], static_key.shape[-2], mask_diagonal, query_offset, attn_mask, key_count)
    wide_key = query.is_cpu and static_key.ndim == 3 and static_key.shape[-1] > value.shape[-1]
    if backend == "sdpa" and wide_key and dropout_p == 0 and not _is_traced(query):
        out = _tiled(query, static_key, value, key_bias, scale, mask, unfold)
    else:
        if unfold is not None:
            query = unfold_queries(query, *unfold)
        if backend == "sdpa" and not wide_key:
            out = _sdpa(query, static_key, value, key_bias, scale, mask, dropout_p)
        else:
            out = F.dropout(_weights(query, static_key, key_bias, scale, mask), dropout_p) @ value
    return out if empty is None else out.masked_fill(empty, 0.0)


def static_key_weights(
    query: Tensor,
    static_key: Tensor,
    *,
    key_bias: Tensor | None = None,
    scale: float | Tensor | None = None,
    mask_diagonal: bool = False,
    query_offset: int = 0,
    attn_mask: Tensor | None = None,
    key_count: Tensor | None = None,
    head_mix: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Compute the attention map ``softmax(scale * (query @ static_key^T + key_bias) + attn_mask)``.

    Arguments and errors are those of ``static_key_attention``. ``head_mix`` is applied to the scaled logits, before
    mask and softmax: a function of (B, h, N, M) to the same.

    Returns:
        Weights that sum to one over the last axis, or are all zero where the mask allows nothing, (B, h, N, M), in
        the dtype of the query.
    """
    check_static_key_attention(
        query, static_key, None, key_bias, scale, mask_diagonal, query_offset, attn_mask, key_count
    )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    mask, empty = _mask(
        query, query.shape[2], static_key.shape[-2], mask_diagonal, query_offset, attn_mask, key_count
    )
    weights = _weights(query, static_key, key_bias, scale, mask, head_mix)
    return weights if empty is None else weights.masked_fill(empty, 0.0)


def _mask(
    query: Tensor,
    num_queries: int,
    num_keys: int,
    mask_diagonal: bool,
    query_offset: int,
    attn_mask: Tensor | None,
    key_count: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """What is added to the logits, in the dtype of the query, and where a row is empty, (..., N, 1).

    Empty rows, in which nothing is allowed, have no softmax: they are opened here, and zeroed in the result.
    """
    always = None if key_count is None else _log_count(key_count, query).unsqueeze(0)
    if mask_diagonal:  # minus infinity where a query would meet its own token
        own = torch.arange(num_queries, device=query.device).unsqueeze(1) + query_offset
        zeros = torch.zeros(num_queries, num_keys, dtype=query.dtype, device=query.device)
        diagonal = zeros.masked_fill(own == torch.arange(num_keys, device=query.device), float("-inf"))
        always = diagonal if always is None else diagonal + always
    if attn_mask is None:
        return always, None  # the diagonal alone leaves a key to every query
    mask = attn_mask.reshape((1,) * (2 - attn_mask.ndim) + attn_mask.shape)  # fused attention wants two axes
    if mask.dtype == torch.bool:
        zeros = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
        mask = zeros.masked_fill(~mask, float("-inf"))
    else:
        mask = mask.to(query.dtype)
    if always is not None:
        mask = always + mask
    empty = (mask == float("-inf")).all(dim=-1, keepdim=True)
    return mask.masked_fill(empty, 0.0), empty


def _log_count(key_count: Tensor, query: Tensor) -> Tensor:
    wide = torch.promote_types(query.dtype, torch.float32)
    return key_count.detach().to(wide).log().to(query.dtype)


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    scale: float | Tensor,
    mask: Tensor | None,
    dropout_p: float,
) -> Tensor:
    if key_bias is not None:
        # as an additive mask the bias would keep the fused kernels out of training (none gives a mask its
        # gradient on the CPU): it becomes one more column of the key, against a query of one
        query = F.pad(query, (0, 1), value=1.0)
        column = key_bias.unsqueeze(-1).expand(*key.shape[:-1], 1)
        key = torch.cat([key, column], dim=-1)
    if isinstance(scale, Tensor):
        query, scale = query * scale, 1.0
    key_width, value_width = query.shape[-1], value.shape[-1]
    if key_width != value_width:
        # fused kernels want one width for all three, CUDA's a multiple of 8: zeros change no sum
        width = -(-max(key_width, value_width) // 8) * 8
        query, key, value = (F.pad(x, (0, width - x.shape[-1])) for x in (query, key, value))
    if key.ndim == 3:
        key = key.expand(query.shape[0], -1, -1, -1)
    if mask is not None and torch.compiler.is_exporting():
        mask = mask.expand(*mask.shape[:-2], query.shape[2], -1)  # onnxruntime wants a row for each query
    out = F.scaled_dot_product_attention(query, key, value, mask, dropout_p, scale=scale)
    return out[..., :value_width]


def _is_traced(query: Tensor) -> bool:
    """Whether a call is traced, compiled or transformed, which neither a loop over tiles nor a kernel supports."""
    forward_mode = forward_ad._current_level >= 0
    tracing = _C._get_tracing_state() is not None or query.is_meta or forward_mode
    return tracing or torch.compiler.is_compiling() or _C._are_functorch_transforms_active()


def _tiled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    scale: float | Tensor,
    mask: Tensor | None,
    unfold: tuple[Size2, int] | None,
) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return _tiled(query, key, value, key_bias, scale, mask, unfold)
    wide = torch.promote_types(query.dtype, torch.float32)
    if query.dtype != wide:  # all have one dtype; a call costs so much that on a few tokens casts to the same count
        bias = None if key_bias is None else key_bias.to(wide)
        mask = None if mask is None else mask.to(wide)
        return _tiled(query.to(wide), key.to(wide), value.to(wide), bias, scale, mask, unfold).to(query.dtype)
    bias = None if key_bias is None else key_bias * scale
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    if unfold is not None and is_convolved(query, key, unfold):
        # on few tokens the query is smaller than the key, and scaling it is the copy that the convolution needs
        return convolved_attention(query * scale, key, bias, value, mask, unfold)
    return tiled_attention(query, key * scale, bias, value, mask, unfold)


def _weights(
    query: Tensor,
    key: Tensor,
    key_bias: Tensor | None,
    scale: float | Tensor,
    mask: Tensor | None,
    head_mix: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    # half-precision logits overflow for large keys: scores and softmax are taken in float32
    wide = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast("cpu" if query.is_meta else query.device.type, enabled=False):
        logits = _product(query.to(wide), key.to(wide).transpose(-2, -1))
        if key_bias is not None:
            logits = logits + key_bias.to(wide).unsqueeze(-2)
        logits = logits * scale
        if head_mix is not None:
            logits = head_mix(logits).to(wide)
        if mask is not None:
            logits = logits + mask
        return logits.softmax(dim=-1).to(query.dtype)


def _product(query: Tensor, key: Tensor) -> Tensor:
    """(B, h, N, dk) @ (h, dk, M), or (B, h, dk, M), to (B, h, N, M)."""
    if key.ndim == 4:
        return query @ key
    # one product a head for all images: broadcast over the batch, the key would be copied for every image
    batch, heads, num_queries, width = query.shape
    logits = query.transpose(0, 1).reshape(heads, batch * num_queries, width) @ key
    return logits.view(heads, batch, num_queries, key.shape[-1]).transpose(0, 1)
