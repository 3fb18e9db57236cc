"""Static keys against queries that have seen their neighbourhood: CSKA and the factorised CSKA."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._checks import check_kernel_size
from .._typing import Key, OffGrid, Size2
from .attention import Rotate
from .static_key import KEY_STD, StaticKeyAttention, reset_key
from .windows import Segment


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
        key: Key = "grid",
        key_size: Size2 | None = None,
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
            key=key,
            key_size=key_size,
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
    still sees the whole map. A rotary position embedding turns the convolved query.
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

    def _segments(
        self, query: Tensor, feat_size: Size2, rows: Callable[[str], Tensor], turn: Rotate
    ) -> list[Segment]:
        prefix, grid = query.tensor_split([self.num_prefix_tokens], dim=2)
        # channels last from token to token: the convolution is faster so, and fused attention far faster on a query
        # whose last axis is contiguous
        maps = (
            grid.transpose(1, 2).reshape(query.shape[0], *feat_size, self.query_conv.in_channels).permute(0, 3, 1, 2)
        )
        convolved = self.query_conv(maps).permute(0, 2, 3, 1).reshape(*grid.transpose(1, 2).shape).transpose(1, 2)
        if self.num_prefix_tokens:
            convolved = torch.cat([prefix, convolved], dim=2)
        # turned after the convolution: the logit of two tokens then depends on the difference of their places
        return [Segment(turn(convolved), turn(rows("static_key")), None, 0)]


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

    key_names: ClassVar[tuple[str, ...]] = ("conv_key", "conv_bias", "prefix_key")

    def _build_keys(self, factory: dict[str, Any]) -> None:
        width, k = self.head_dim, self.kernel_size
        self.conv_key = self._make_key((width, k, k), self._key_std("conv_key"), factory)
        self.conv_bias = self._make_key((), self._key_std("conv_bias"), factory)
        with_prefix = self.num_prefix_tokens > 0
        self.prefix_key = self._make_key((width,), self._key_std("prefix_key"), factory) if with_prefix else None

    def _key_std(self, name: str) -> float:
        """Standard deviation of a fresh key; a convolution's is that of a uniform variable within its bound."""
        return KEY_STD if name == "prefix_key" else self._bound() / 3**0.5

    def _bound(self) -> float:
        """Largest entry of a fresh convolution, torch's default."""
        return math.pow(self.head_dim * self.kernel_size**2, -0.5)

    def _reset_keys(self) -> None:
        uniform = partial(nn.init.uniform_, a=-self._bound(), b=self._bound())
        reset_key(self.conv_key, uniform)
        reset_key(self.conv_bias, uniform)
        reset_key(self.prefix_key, partial(nn.init.normal_, std=KEY_STD))

    def macs(self, feat_size: Size2 | None = None) -> int:
        """Multiply-accumulates of one image, in closed form; see ``TokenMixer.macs``."""
        wider = self.num_heads * self.head_dim * (self.kernel_size**2 - 1)
        return super().macs(feat_size) + self._num_logits(feat_size or self.feat_size)[1] * wider

    def _segments(
        self, query: Tensor, feat_size: Size2, rows: Callable[[str], Tensor], turn: Rotate
    ) -> list[Segment]:
        prefix, grid = turn(query).tensor_split([self.num_prefix_tokens], dim=2)
        key = turn(rows("conv_key").permute(3, 4, 0, 1, 2))  # each d numbers of a filter are a key of their row
        key = key.permute(2, 3, 0, 1, 4).flatten(2)  # as unfold_queries lays neighbourhoods out
        unfold = (feat_size, self.kernel_size)
        segment = Segment(grid, key, rows("conv_bias"), self.num_prefix_tokens, unfold)
        if self.prefix_key is None:
            return [segment]
        return [Segment(prefix, turn(rows("prefix_key")), None, 0), segment]
