"""The layers of static-key attention: SKA, CSKA and the factorised CSKA."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._checks import check_kernel_size
from .._typing import OffGrid, Size2
from ..errors import StaticKeyError
from .attention import AttendOp, AttentionMixer
from .parts import GridState
from .windows import Segment, attend_in_windows, num_window_logits

KEY_STD = 1.0
"""Standard deviation of fresh keys; docs/results/key_init.md has the measurement behind it."""


class StaticKeyAttention(GridState, AttentionMixer):
    """SKA: attention whose key is a learned parameter, one row per token position and head.

    ``out = proj(softmax(scale * q(x) @ static_key^T) @ v(x))``. Adding one vector to every row of the key
    changes nothing, so a key is identifiable only up to that.

    Attributes: ``qv`` (rows: all q, then all v) or ``v`` when ``query_proj=False``; ``static_key``
    (h, P + H*W, d); ``proj``; ``log_temperature`` when it is learned; ``backend``, the op's backend.

    The other arguments are those of ``SelfAttention``.

    Args:
        feat_size: The token grid (H, W) the key is built for.
        query_proj: Project the queries; if false, the input itself, split into heads, is the query.
        off_grid: What ``forward`` does on another grid than ``feat_size``: ``"resample"`` the key (attention
            stays global), or tile the map with ``"window"``s of the built grid (cost linear in tokens; prefix
            tokens are seen by, and see, the whole map). ``torch.compile`` makes a graph for each way in which
            windows are cut at the border, so that its ``recompile_limit`` may have to be raised for many grids.

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
        if off_grid not in ("resample", "window"):
            raise StaticKeyError(f"off_grid={off_grid!r} must be 'resample' or 'window'")
        self.off_grid = off_grid
        self.query_proj = query_proj
        super().__init__(
            dim,
            num_heads,
            feat_size=feat_size,
            num_prefix_tokens=num_prefix_tokens,
            head_dim=head_dim,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            device=device,
            dtype=dtype,
        )
        self._set_logits(scale, learned_temperature, mask_diagonal, {"device": device, "dtype": dtype})

    def _build(self, qkv_bias: bool, proj_bias: bool, factory: dict[str, Any]) -> None:
        super()._build(qkv_bias, proj_bias, factory)
        inner = self.num_heads * self.head_dim
        if self.query_proj:
            self.qv = nn.Linear(self.dim, 2 * inner, bias=qkv_bias, **factory)
        elif inner == self.dim:
            self.v = nn.Linear(self.dim, inner, bias=qkv_bias, **factory)
        else:
            raise StaticKeyError(
                f"query_proj=False uses x as the query, so num_heads*head_dim={inner} must equal dim={self.dim}"
            )
        self._build_keys(factory)

    def _build_keys(self, factory: dict[str, Any]) -> None:
        """Make the parameters that stand for keys, and what shapes the query."""
        self.static_key = nn.Parameter(torch.empty(self.num_heads, self.num_tokens, self.head_dim, **factory))

    def reset_parameters(self) -> None:
        """Initialise keys and temperature; the projections initialise themselves."""
        super().reset_parameters()
        self._reset_keys()

    def _reset_keys(self) -> None:
        nn.init.normal_(self.static_key, std=KEY_STD)

    def _segments(self, query: Tensor, feat_size: Size2) -> list[Segment]:
        """Queries of all tokens on ``feat_size``, in token order, with their keys for the built grid."""
        return [Segment(query, self.static_key, None, 0)]

    def _attend(self, x: Tensor, feat_size: Size2, op: AttendOp) -> Tensor:
        if self.query_proj:
            query, value = self._split_heads(self.qv(x), 2)
        else:
            (value,) = self._split_heads(self.v(x), 1)
            query = self._split_heads(x, 1)[0].to(value.dtype)
        query = self.q_norm(query).to(value.dtype)  # under autocast norms answer in float32
        segments = self._segments(query, feat_size)
        if self._tiles(feat_size):
            return attend_in_windows(
                segments,
                value,
                op,
                feat_size=feat_size,
                window_size=self.feat_size,
                num_prefix_tokens=self.num_prefix_tokens,
                mask_diagonal=self.mask_diagonal,
            )
        parts = []
        for segment in segments:
            key, bias = self._resample(segment.key, feat_size), segment.key_bias
            bias = None if bias is None else self._resample(bias, feat_size)
            parts.append(segment._replace(key=key, key_bias=bias).attend(op, value))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _tiles(self, feat_size: Size2) -> bool:
        return self.off_grid == "window" and feat_size != self.feat_size

    def _num_logits(self, feat_size: Size2 | None) -> tuple[int, int]:
        """Logits per head that prefix queries make, and grid queries, on ``feat_size``."""
        grid, tokens = self._count(feat_size)
        prefix = self.num_prefix_tokens
        if feat_size is None or not self._tiles(feat_size):
            return prefix * tokens, grid * tokens
        return prefix * tokens, num_window_logits(feat_size, self.feat_size, prefix)

    def macs(self, feat_size: Size2 | None = None) -> int:
        """Multiply-accumulates of one image, in closed form; see ``TokenMixer.macs``."""
        tokens = self._count(feat_size)[1]
        return self._attention_macs(tokens, sum(self._num_logits(feat_size)), self.head_dim, 1 + self.query_proj)


class _ConvolvedQueryAttention(StaticKeyAttention):
    """The constructor of the two layers whose logits see a k x k neighbourhood of queries."""

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

    def _build_keys(self, factory: dict[str, Any]) -> None:
        super()._build_keys(factory)
        inner = self.num_heads * self.head_dim
        padding = self.kernel_size // 2
        self.query_conv = nn.Conv2d(inner, inner, self.kernel_size, padding=padding, groups=self.num_heads, **factory)

    def _reset_keys(self) -> None:
        super()._reset_keys()
        self.query_conv.reset_parameters()

    def macs(self, feat_size: Size2 | None = None) -> int:
        """Multiply-accumulates of one image, in closed form; see ``TokenMixer.macs``."""
        inner = self.num_heads * self.head_dim
        return super().macs(feat_size) + self._count(feat_size)[0] * inner * self.head_dim * self.kernel_size**2

    def _segments(self, query: Tensor, feat_size: Size2) -> list[Segment]:
        prefix, grid = query.tensor_split([self.num_prefix_tokens], dim=2)
        # channels last from token to token: the convolution is faster so, and fused attention far faster on a query
        # whose last axis is contiguous
        maps = (
            grid.transpose(1, 2).reshape(query.shape[0], *feat_size, self.query_conv.in_channels).permute(0, 3, 1, 2)
        )
        convolved = self.query_conv(maps).permute(0, 2, 3, 1).reshape(*grid.transpose(1, 2).shape).transpose(1, 2)
        if self.num_prefix_tokens:
            convolved = torch.cat([prefix, convolved], dim=2)
        return [Segment(convolved, self.static_key, None, 0)]


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

    def _build_keys(self, factory: dict[str, Any]) -> None:
        heads, tokens, width, k = self.num_heads, self.num_tokens, self.head_dim, self.kernel_size
        self.conv_key = nn.Parameter(torch.empty(heads, tokens, width, k, k, **factory))
        self.conv_bias = nn.Parameter(torch.empty(heads, tokens, **factory))
        with_prefix = self.num_prefix_tokens > 0
        self.prefix_key = nn.Parameter(torch.empty(heads, tokens, width, **factory)) if with_prefix else None

    def _reset_keys(self) -> None:
        bound = (self.head_dim * self.kernel_size**2) ** -0.5  # torch's default for a convolution
        nn.init.uniform_(self.conv_key, -bound, bound)
        nn.init.uniform_(self.conv_bias, -bound, bound)
        if self.prefix_key is not None:
            nn.init.normal_(self.prefix_key, std=KEY_STD)

    def macs(self, feat_size: Size2 | None = None) -> int:
        """Multiply-accumulates of one image, in closed form; see ``TokenMixer.macs``."""
        wider = self.num_heads * self.head_dim * (self.kernel_size**2 - 1)
        return super().macs(feat_size) + self._num_logits(feat_size)[1] * wider

    def _segments(self, query: Tensor, feat_size: Size2) -> list[Segment]:
        prefix, grid = query.tensor_split([self.num_prefix_tokens], dim=2)
        key = self.conv_key.permute(0, 1, 3, 4, 2).flatten(2)  # as unfold_queries lays neighbourhoods out
        unfold = (feat_size, self.kernel_size)
        segment = Segment(grid, key, self.conv_bias, self.num_prefix_tokens, unfold)
        if self.prefix_key is None:
            return [segment]
        return [Segment(prefix, self.prefix_key, None, 0), segment]
