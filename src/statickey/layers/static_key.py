"""The layers of static-key attention: SKA, CSKA and the factorised CSKA."""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .._checks import check_kernel_size
from .._typing import OffGrid, Size2
from ..errors import FeatSizeError, StaticKeyError
from ..ops import window_key_rows, window_merge, window_partition
from .mixer import AttendOp, AttentionMixer
from .parts import GridState

KEY_STD = 1.0
"""Standard deviation of fresh keys; docs/results/key_init.md has the measurement behind it."""


class _Segment(NamedTuple):
    """Queries of consecutive tokens that share one key."""

    query: Tensor
    key: Tensor
    key_bias: Tensor | None
    first_token: int
    unfold: tuple[Size2, int] | None = None


class StaticKeyAttention(GridState, AttentionMixer):
    """SKA: attention whose key is a learned parameter, one row per token position and head.

    ``out = proj(softmax(scale * q(x) @ static_key^T) @ v(x))``. Adding one vector to every row of the key
    changes nothing, so a key is identifiable only up to that.

    Attributes: ``qv`` (rows: all q, then all v) or ``v`` when ``query_proj=False``; ``static_key``
    (h, P + H*W, d); ``proj``; ``log_temperature`` when it is learned; ``backend``, the op's backend.

    Args:
        dim: Channels of the tokens.
        num_heads: Number of heads h.
        feat_size: The token grid (H, W) the key is built for.
        num_prefix_tokens: P, class and register tokens before the grid.
        head_dim: Width d of one head; default ``dim // num_heads``.
        query_proj: Project the queries; if false, the input itself, split into heads, is the query.
        qkv_bias: Whether the query and value projections have a bias.
        proj_bias: Whether the output projection has a bias.
        attn_drop: Dropout rate on the attention weights.
        proj_drop: Dropout rate on the output.
        scale: Factor on the logits; default ``head_dim ** -0.5``.
        learned_temperature: Learn the factor, starting from ``scale``.
        mask_diagonal: Tokens do not attend to themselves.
        off_grid: What ``forward`` does on another grid than ``feat_size``: ``"resample"`` the key (attention
            stays global), or tile the map with ``"window"``s of the built grid (cost linear in tokens; prefix
            tokens are seen by, and see, the whole map).
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        StaticKeyError: An argument is out of range, or ``query_proj=False`` with ``h*d != dim``.

    Source:
        Hu, Zhou, Rostami, Static Key Attention in Vision, arXiv 2412.07049.
    """

    grid_parameters: ClassVar[tuple[str, ...]] = ("static_key",)

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        feat_size: Size2,
        num_prefix_tokens: int = 0,
        head_dim: int | None = None,
        query_proj: bool = True,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        scale: float | None = None,
        learned_temperature: bool = False,
        mask_diagonal: bool = False,
        off_grid: OffGrid = "resample",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            feat_size=feat_size,
            num_prefix_tokens=num_prefix_tokens,
            head_dim=head_dim,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            scale=scale,
            learned_temperature=learned_temperature,
            mask_diagonal=mask_diagonal,
            device=device,
            dtype=dtype,
        )
        if off_grid not in ("resample", "window"):
            raise StaticKeyError(f"off_grid={off_grid!r} must be 'resample' or 'window'")
        inner = self.num_heads * self.head_dim
        if not query_proj and inner != dim:
            raise StaticKeyError(
                f"query_proj=False uses x as the query, so num_heads*head_dim={inner} must equal dim={dim}"
            )
        self.off_grid = off_grid
        self.query_proj = query_proj
        if query_proj:
            self.qv = nn.Linear(dim, 2 * inner, bias=qkv_bias, device=device, dtype=dtype)
        else:
            self.v = nn.Linear(dim, inner, bias=qkv_bias, device=device, dtype=dtype)
        self._make_keys(device, dtype)
        self.reset_parameters()

    def _make_keys(self, device: Any, dtype: Any) -> None:
        shape = (self.num_heads, self.num_tokens, self.head_dim)
        self.static_key = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Initialise keys (normal, std ``KEY_STD``) and temperature."""
        super().reset_parameters()
        nn.init.normal_(self.static_key, std=KEY_STD)

    def _segments(self, query: Tensor, feat_size: Size2) -> list[_Segment]:
        """Queries of all tokens on ``feat_size``, in token order, with their keys for the built grid."""
        return [_Segment(query, self.static_key, None, 0)]

    def _attend(self, x: Tensor, feat_size: Size2, op: AttendOp) -> Tensor:
        if self.query_proj:
            query, value = self._split_heads(self.qv(x), 2)
        else:
            (value,) = self._split_heads(self.v(x), 1)
            query = self._split_heads(x, 1)[0].to(value.dtype)
        query = self.q_norm(query).to(value.dtype)  # under autocast norms answer in float32
        segments = self._segments(query, feat_size)
        if self._tiles(feat_size):
            return self._attend_windows(segments, value, feat_size, op)
        parts = []
        for seg in segments:
            key, bias = self._resample(seg.key, feat_size), seg.key_bias
            bias = None if bias is None else self._resample(bias, feat_size)
            parts.append(_call(op, seg._replace(key=key, key_bias=bias), value))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _tiles(self, feat_size: Size2) -> bool:
        return self.off_grid == "window" and feat_size != self.feat_size

    def _num_logits(self, feat_size: Size2 | None) -> tuple[int, int]:
        """Logits per head that prefix queries make, and grid queries, on ``feat_size``."""
        grid, tokens = self._count(feat_size)
        prefix = self.num_prefix_tokens
        if feat_size is None or not self._tiles(feat_size):
            return prefix * tokens, grid * tokens
        per_window = [
            rows * cols * (rows * cols + prefix)
            for rows in _extents(feat_size[0], self.feat_size[0])
            for cols in _extents(feat_size[1], self.feat_size[1])
        ]
        return prefix * tokens, sum(per_window)

    def macs(self, feat_size: Size2 | None = None) -> int:
        """Multiply-accumulates of one image, in closed form; see ``TokenMixer.macs``."""
        tokens = self._count(feat_size)[1]
        return self._attention_macs(tokens, sum(self._num_logits(feat_size)), self.head_dim, 1 + self.query_proj)

    def _attend_windows(self, segments: list[_Segment], value: Tensor, feat_size: Size2, op: AttendOp) -> Tensor:
        num_prefix = self.num_prefix_tokens
        batch = value.shape[0]
        prefix_rows = torch.arange(num_prefix, device=value.device)
        out = []
        for seg in segments:
            cut = max(num_prefix - seg.first_token, 0)
            if cut:
                y, x = (torch.arange(n, device=value.device) for n in feat_size)
                tiled = (y % self.feat_size[0]).unsqueeze(1) * self.feat_size[1] + x % self.feat_size[1]
                rows = torch.cat([prefix_rows, num_prefix + tiled.flatten()])
                out.append(_call(op, _take_rows(seg, rows)._replace(query=seg.query[:, :, :cut]), value))
            if cut == seg.query.shape[2]:
                continue
            kernel_size = 1 if seg.unfold is None else seg.unfold[1]  # neighbourhoods reach beyond the window
            border = kernel_size // 2
            queries = window_partition(seg.query[:, :, cut:], feat_size, self.feat_size, border=border)
            values = window_partition(value[:, :, num_prefix:], feat_size, self.feat_size)
            parts = []
            for (shape, query), (_, val) in zip(queries, values, strict=True):
                covered = window_key_rows(self.feat_size, shape, value.device)
                rows = torch.cat([prefix_rows, num_prefix + covered])
                if self.mask_diagonal and len(rows) < 2:
                    raise FeatSizeError(
                        f"windows of {self.feat_size} leave one of a single token on feat_size={feat_size}, which "
                        "mask_diagonal=True leaves nothing to attend to; use a multiple of the window"
                    )
                if num_prefix:
                    windows = val.shape[0] // batch if batch else 0
                    shared = value[:, :, :num_prefix].repeat_interleave(windows, dim=0)
                    val = torch.cat([shared, val], dim=2)
                unfold = None if seg.unfold is None else (shape, kernel_size)
                part = _take_rows(seg, rows)._replace(query=query, first_token=num_prefix, unfold=unfold)
                parts.append(_call(op, part, val))
            out.append(window_merge(parts, feat_size, self.feat_size))
        return torch.cat(out, dim=2)


class _ConvolvedQueryAttention(StaticKeyAttention):
    """The shared constructor of the two layers whose logits see a k x k neighbourhood of queries."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        feat_size: Size2,
        num_prefix_tokens: int = 0,
        head_dim: int | None = None,
        query_proj: bool = True,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        scale: float | None = None,
        learned_temperature: bool = False,
        mask_diagonal: bool = False,
        off_grid: OffGrid = "resample",
        kernel_size: int = 3,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_kernel_size(kernel_size)
        self.kernel_size = kernel_size
        super().__init__(
            dim,
            num_heads,
            feat_size=feat_size,
            num_prefix_tokens=num_prefix_tokens,
            head_dim=head_dim,
            query_proj=query_proj,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            scale=scale,
            learned_temperature=learned_temperature,
            mask_diagonal=mask_diagonal,
            off_grid=off_grid,
            device=device,
            dtype=dtype,
        )


class FactorizedConvStaticKeyAttention(_ConvolvedQueryAttention):
    """Factorised CSKA (fcska): a grouped k x k convolution of the query map, then a plain static key.

    CSKA restricted to logits of rank head_dim: it costs ``head_dim * N`` per query and head instead of
    ``k*k * head_dim * N``. Prefix queries, which have no neighbourhood, skip the convolution.

    Constructor, shapes and errors are those of ``StaticKeyAttention``, with ``kernel_size=3`` (odd) and one
    attribute more, ``query_conv``: Conv2d(h*d, h*d, k, groups=h). With ``off_grid="window"`` the convolution
    still sees the whole map.
    """

    def _make_keys(self, device: Any, dtype: Any) -> None:
        super()._make_keys(device, dtype)
        inner = self.num_heads * self.head_dim
        self.query_conv = nn.Conv2d(
            inner,
            inner,
            self.kernel_size,
            padding=self.kernel_size // 2,
            groups=self.num_heads,
            device=device,
            dtype=dtype,
        )

    def reset_parameters(self) -> None:
        """Initialise keys (normal, std ``KEY_STD``), the query convolution (torch's default), temperature."""
        super().reset_parameters()
        self.query_conv.reset_parameters()

    def macs(self, feat_size: Size2 | None = None) -> int:
        """Multiply-accumulates of one image, in closed form; see ``TokenMixer.macs``."""
        inner = self.num_heads * self.head_dim
        return super().macs(feat_size) + self._count(feat_size)[0] * inner * self.head_dim * self.kernel_size**2

    def _segments(self, query: Tensor, feat_size: Size2) -> list[_Segment]:
        prefix, grid = query.tensor_split([self.num_prefix_tokens], dim=2)
        # channels last from token to token: the convolution is faster so, and fused attention far faster on a query
        # whose last axis is contiguous
        maps = (
            grid.transpose(1, 2).reshape(query.shape[0], *feat_size, self.query_conv.in_channels).permute(0, 3, 1, 2)
        )
        convolved = self.query_conv(maps).permute(0, 2, 3, 1).reshape(*grid.transpose(1, 2).shape).transpose(1, 2)
        if self.num_prefix_tokens:
            convolved = torch.cat([prefix, convolved], dim=2)
        return [_Segment(convolved, self.static_key, None, 0)]


class ConvStaticKeyAttention(_ConvolvedQueryAttention):
    """CSKA: logits made by a grouped k x k convolution over the query map, head_dim -> N channels per head.

    The same op as SKA with the k x k neighbourhood of each query as the query. ``scale`` (and the learned
    temperature) multiplies the convolution logits, bias included. Prefix queries have no neighbourhood and
    use a plain key of their own.

    Constructor and errors are those of ``StaticKeyAttention``, with ``kernel_size=3`` (odd). In place of
    ``static_key`` it has ``conv_key`` (h, P + H*W, d, k, k), ``conv_bias`` (h, P + H*W) and ``prefix_key``
    (h, P + H*W, d), which is None without prefix tokens. With ``off_grid="window"`` neighbourhoods still
    come from the whole map.

    Source:
        Hu, Zhou, Rostami, Static Key Attention in Vision, arXiv 2412.07049.
    """

    grid_parameters: ClassVar[tuple[str, ...]] = ("conv_key", "conv_bias", "prefix_key")

    def _make_keys(self, device: Any, dtype: Any) -> None:
        heads, tokens, width, k = self.num_heads, self.num_tokens, self.head_dim, self.kernel_size

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.conv_key = empty(heads, tokens, width, k, k)
        self.conv_bias = empty(heads, tokens)
        self.prefix_key = empty(heads, tokens, width) if self.num_prefix_tokens else None

    def reset_parameters(self) -> None:
        """Initialise the convolution as torch does, the prefix key as SKA's, and the temperature."""
        AttentionMixer.reset_parameters(self)
        bound = (self.head_dim * self.kernel_size**2) ** -0.5
        nn.init.uniform_(self.conv_key, -bound, bound)
        nn.init.uniform_(self.conv_bias, -bound, bound)
        if self.prefix_key is not None:
            nn.init.normal_(self.prefix_key, std=KEY_STD)

    def macs(self, feat_size: Size2 | None = None) -> int:
        """Multiply-accumulates of one image, in closed form; see ``TokenMixer.macs``."""
        wider = self.num_heads * self.head_dim * (self.kernel_size**2 - 1)
        return super().macs(feat_size) + self._num_logits(feat_size)[1] * wider

    def _segments(self, query: Tensor, feat_size: Size2) -> list[_Segment]:
        prefix, grid = query.tensor_split([self.num_prefix_tokens], dim=2)
        key = self.conv_key.permute(0, 1, 3, 4, 2).flatten(2)  # as unfold_queries lays neighbourhoods out
        unfold = (feat_size, self.kernel_size)
        segment = _Segment(grid, key, self.conv_bias, self.num_prefix_tokens, unfold)
        if self.prefix_key is None:
            return [segment]
        return [_Segment(prefix, self.prefix_key, None, 0), segment]


def _call(op: AttendOp, seg: _Segment, value: Tensor) -> Tensor:
    # under autocast the projections are half precision and the keys are not: cast before broadcasting
    key = seg.key.to(seg.query.dtype)
    bias = None if seg.key_bias is None else seg.key_bias.to(seg.query.dtype)
    return op(seg.query, key, value, key_bias=bias, query_offset=seg.first_token, unfold=seg.unfold)


def _extents(extent: int, window: int) -> list[int]:
    """Window extents along one axis, the last one cut at the border."""
    return [min(window, extent - start) for start in range(0, extent, window)]


def _take_rows(seg: _Segment, rows: Tensor) -> _Segment:
    bias = None if seg.key_bias is None else seg.key_bias[:, rows]
    return seg._replace(key=seg.key[:, rows], key_bias=bias)
