"""What static keys are compared with: self-attention, and controls that take more and more away from it."""

from abc import abstractmethod
from functools import partial
from math import prod
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from timm.models.metaformer import StarReLU
from torch import Tensor, fx, nn

from .._checks import check_feat_size, check_map, check_no_mask, check_not_causal
from .._typing import Size2
from ..errors import StaticKeyError
from .attention import AttendOp, AttentionMixer, Rotate, linear_rows, with_pos_embed
from .mixer import GridState, TokenMixer
from .parts import Reduction


class SelfAttention(AttentionMixer):
    """Multi-head self-attention (mhsa), fused: query, key and value all come from the input.

    Attributes: ``qkv``, ``proj``, ``log_temperature`` when it is learned, and ``k_norm`` beside ``q_norm``.

    Other arguments are those of ``TokenMixer``; attention itself runs on any grid.

    Args:
        scale: Factor on the logits; default ``head_dim ** -0.5``.
        learned_temperature: Learn the factor, starting from ``scale``.
        mask_diagonal: Tokens do not attend to themselves.
    """

    adds_pos_embed = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        feat_size: Size2,
        num_prefix_tokens: int = 0,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        scale: float | None = None,
        learned_temperature: bool = False,
        mask_diagonal: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
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
        self.qkv = nn.Linear(self.dim, 3 * self.num_heads * self.head_dim, bias=qkv_bias, **factory)
        self.k_norm: nn.Module = nn.Identity()

    def set_reduction(self, reduction: Reduction) -> None:
        """Take keys and values from fewer tokens, which a host makes."""
        self.reduction = reduction

    def macs(self, feat_size: Size2 | None = None) -> int:
        """Multiply-accumulates of one image, in closed form; see ``TokenMixer.macs``."""
        tokens = self._count(feat_size)[1]
        if self.reduction is None:
            return self._attention_macs(tokens, tokens**2, self.head_dim, 3)
        feat_size = self.feat_size if feat_size is None else check_feat_size(feat_size)
        keys = prod(self.reduction.grid(feat_size))
        return self.reduction.macs(feat_size) + self._attention_macs(tokens, tokens * keys, self.head_dim, 3, keys)

    def _attend(
        self, x: Tensor, feat_size: Size2, op: AttendOp, turn: Rotate, pos_embed: Tensor | None = None
    ) -> Tensor:
        if self.reduction is None and pos_embed is None:
            query, key, value = self._split_heads(self.qkv(x), 3)
        else:
            inner, placed = self.num_heads * self.head_dim, with_pos_embed(x, pos_embed)
            reduce = partial(self.reduction, feat_size=feat_size) if self.reduction is not None else nn.Identity()
            (query,) = self._split_heads(linear_rows(self.qkv, placed, slice(inner)), 1)
            if pos_embed is None:
                key, value = self._split_heads(linear_rows(self.qkv, reduce(x), slice(inner, None)), 2)
            else:
                (key,) = self._split_heads(linear_rows(self.qkv, reduce(placed), slice(inner, 2 * inner)), 1)
                (value,) = self._split_heads(linear_rows(self.qkv, reduce(x), slice(2 * inner, None)), 1)
        query, key = self.q_norm(query).to(value.dtype), self.k_norm(key).to(value.dtype)
        return op(turn(query), turn(key), value)


class SharedKeyValueAttention(AttentionMixer):
    """Self-attention whose value is its key: it too saves one of three projections, and keeps a key of the input.

    Source:
        arXiv 2606.04032.
    """

    def _build(self, qkv_bias: bool, proj_bias: bool, factory: dict[str, Any]) -> None:
        super()._build(qkv_bias, proj_bias, factory)
        self.qv = nn.Linear(self.dim, 2 * self.num_heads * self.head_dim, bias=qkv_bias, **factory)

    def macs(self, feat_size: Size2 | None = None) -> int:
        """Multiply-accumulates of one image, in closed form; see ``TokenMixer.macs``."""
        tokens = self._count(feat_size)[1]
        return self._attention_macs(tokens, tokens**2, self.head_dim, 2)

    def _attend(
        self, x: Tensor, feat_size: Size2, op: AttendOp, turn: Rotate, pos_embed: Tensor | None = None
    ) -> Tensor:
        query, value = self._split_heads(self.qv(x), 2)
        return op(turn(self.q_norm(query).to(value.dtype)), turn(value), value)


class SynthesizerAttention(GridState, AttentionMixer):
    """Dense Synthesizer: each token's logits come from a two-layer perceptron of that token.

    ``softmax(relu(q(x)) @ static_key^T + key_bias) @ v(x)``: a static key behind a non-linear query.

    Source:
        Tay et al., Synthesizer: Rethinking Self-Attention in Transformer Models, arXiv 2005.00743.
    """

    grid_parameters = ("static_key", "key_bias")
    rotates = False

    def _build(self, qkv_bias: bool, proj_bias: bool, factory: dict[str, Any]) -> None:
        super()._build(qkv_bias, proj_bias, factory)
        self.scale = 1.0
        heads, tokens, width = self.num_heads, self.num_tokens, self.head_dim
        self.qv = nn.Linear(self.dim, 2 * heads * width, bias=qkv_bias, **factory)
        self.static_key = nn.Parameter(torch.empty(heads, tokens, width, **factory))
        self.key_bias = nn.Parameter(torch.empty(heads, tokens, **factory))

    def reset_parameters(self) -> None:
        """Initialise the second layer of the perceptron as torch does a Linear's weight, its bias at zero."""
        super().reset_parameters()
        bound = self.head_dim**-0.5
        nn.init.uniform_(self.static_key, -bound, bound)
        nn.init.zeros_(self.key_bias)

    def macs(self, feat_size: Size2 | None = None) -> int:
        """Multiply-accumulates of one image, in closed form; see ``TokenMixer.macs``."""
        tokens = self._count(feat_size)[1]
        return self._attention_macs(tokens, tokens**2, self.head_dim, 2)

    def _attend(
        self, x: Tensor, feat_size: Size2, op: AttendOp, turn: Rotate, pos_embed: Tensor | None = None
    ) -> Tensor:
        query, value = self._split_heads(self.qv(x), 2)
        query = self.q_norm(query).to(value.dtype)
        key = self._resample(self.static_key, self.feat_size, feat_size).to(query.dtype)
        bias = self._resample(self.key_bias, self.feat_size, feat_size).to(query.dtype)
        return op(F.relu(query), key, value, key_bias=bias)


class ConstantAttention(GridState, TokenMixer):
    """A learned map per head that does not see the input at all: ``softmax(logits) @ v(x)``.

    Source:
        The Random Synthesizer of arXiv 2005.00743, trained and fixed.
    """

    grid_parameters = ("logits",)
    trainable: ClassVar[bool] = True

    def _build(self, qkv_bias: bool, proj_bias: bool, factory: dict[str, Any]) -> None:
        inner = self.num_heads * self.head_dim
        self.v = nn.Linear(self.dim, inner, bias=qkv_bias, **factory)
        logits = torch.empty(self.num_heads, self.num_tokens, self.num_tokens, **factory)
        if self.trainable:
            self.logits = nn.Parameter(logits)
        else:
            self.register_buffer("logits", logits)
        self.proj = nn.Linear(inner, self.dim, bias=proj_bias, **factory)

    def reset_parameters(self) -> None:
        """Learned maps start near uniform (std 0.02); frozen ones are drawn unit normal."""
        nn.init.normal_(self.logits, std=0.02 if self.trainable else 1.0)

    def _resample(self, tensor: Tensor, grid: Size2, new_grid: Size2) -> Tensor:
        for _ in range(2):  # rows, then columns
            tensor = super()._resample(tensor, grid, new_grid).transpose(1, 2)
        return tensor

    def attention_weights(
        self, x: Tensor, feat_size: Size2 | None = None, *, attn_mask: Tensor | None = None
    ) -> Tensor:
        """The map of every head, the same for every image, (B, h, N, N); a mask is refused."""
        check_no_mask(type(self).__name__, attn_mask)
        x, feat_size = self._tokens(x, feat_size)
        weights = self._resample(self.logits, self.feat_size, feat_size).softmax(dim=-1)
        return weights.expand(x.shape[0], -1, -1, -1)

    def macs(self, feat_size: Size2 | None = None) -> int:
        """Multiply-accumulates of one image, in closed form; see ``TokenMixer.macs``."""
        tokens = self._count(feat_size)[1]
        inner = self.num_heads * self.head_dim
        return 2 * self.dim * inner * tokens + inner * tokens**2

    def _mix(self, x: Tensor, feat_size: Size2, attn_mask: Tensor | None) -> Tensor:
        check_no_mask(type(self).__name__, attn_mask)
        batch, tokens, _ = x.shape
        value = self.v(x).reshape(batch, tokens, self.num_heads, self.head_dim).transpose(1, 2)
        weights = self._resample(self.logits, self.feat_size, feat_size).softmax(dim=-1).to(value.dtype)
        out = self.attn_drop(weights) @ value
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


class RandomAttention(ConstantAttention):
    """``ConstantAttention`` with a random map that is never trained: what mixing at all is worth.

    Source:
        RandFormer of Yu et al., MetaFormer Baselines for Vision, arXiv 2210.13452.
    """

    trainable: ClassVar[bool] = False


class IdentityMixer(TokenMixer):
    """No mixing: tokens pass through. What the rest of the network does alone."""

    def macs(self, feat_size: Size2 | None = None) -> int:
        """None."""
        return 0

    def _mix(self, x: Tensor, feat_size: Size2, attn_mask: Tensor | None) -> Tensor:
        check_no_mask(type(self).__name__, attn_mask)
        return x


class _MapMixer(TokenMixer):
    """A mixer of maps (B, dim, H, W), without a place for prefix tokens."""

    layout: ClassVar[Literal["NLC", "NCHW"]] = "NCHW"

    def _build(self, qkv_bias: bool, proj_bias: bool, factory: dict[str, Any]) -> None:
        if self.num_prefix_tokens:
            raise StaticKeyError(
                f"{type(self).__name__} mixes a grid and has no way to reach num_prefix_tokens="
                f"{self.num_prefix_tokens}; build the host without them (class_token=False, global_pool='avg')"
            )

    def forward(
        self,
        x: Tensor,
        feat_size: Size2 | None = None,
        *,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        rope: Tensor | None = None,
        pos_embed: Tensor | None = None,
    ) -> Tensor:
        """Mix tokens or a map; see ``TokenMixer.forward``."""
        check_no_mask(type(self).__name__, attn_mask)
        if self.input_fmt != "NCHW" or isinstance(x, fx.Proxy) or rope is not None or pos_embed is not None:
            return super().forward(x, feat_size, is_causal=is_causal, rope=rope, pos_embed=pos_embed)
        check_not_causal(is_causal)
        check_map(x, self.dim, self.num_prefix_tokens, channels_first=True)
        return self.proj_drop(self._mix_map(x))  # type: ignore[no-any-return]

    def _mix(self, x: Tensor, feat_size: Size2, attn_mask: Tensor | None) -> Tensor:
        maps = x.transpose(1, 2).reshape(x.shape[0], self.dim, *feat_size)
        return self.proj_drop(self._mix_map(maps)).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]

    @abstractmethod
    def _mix_map(self, maps: Tensor) -> Tensor:
        """(B, dim, H, W) to the same."""


class PoolMixer(_MapMixer):
    """3 x 3 average pooling minus the token itself; no parameters.

    Source:
        Yu et al., MetaFormer Is Actually What You Need for Vision, arXiv 2111.11418.
    """

    def macs(self, feat_size: Size2 | None = None) -> int:
        """None: sums are not products."""
        return 0

    def _mix_map(self, maps: Tensor) -> Tensor:
        return F.avg_pool2d(maps, 3, stride=1, padding=1, count_include_pad=False) - maps


class SepConvMixer(_MapMixer):
    """Inverted separable convolution: pointwise to twice the width, StarReLU, 7 x 7 depth-wise, pointwise.

    ``qkv_bias`` gives the first pointwise layer a bias, ``proj_bias`` the last. Names are timm's.

    Source:
        Yu et al., MetaFormer Baselines for Vision, arXiv 2210.13452.
    """

    def _build(self, qkv_bias: bool, proj_bias: bool, factory: dict[str, Any]) -> None:
        super()._build(qkv_bias, proj_bias, factory)
        hidden = 2 * self.dim
        self.pwconv1 = nn.Conv2d(self.dim, hidden, 1, bias=qkv_bias, **factory)
        self.act1 = StarReLU(**factory)
        self.dwconv = nn.Conv2d(hidden, hidden, 7, padding=3, groups=hidden, bias=False, **factory)
        self.pwconv2 = nn.Conv2d(hidden, self.dim, 1, bias=proj_bias, **factory)

    def macs(self, feat_size: Size2 | None = None) -> int:
        """Multiply-accumulates of one image, in closed form; see ``TokenMixer.macs``."""
        return self._count(feat_size)[0] * (4 * self.dim**2 + 2 * self.dim * 49)

    def _mix_map(self, maps: Tensor) -> Tensor:
        return self.pwconv2(self.dwconv(self.act1(self.pwconv1(maps))))  # type: ignore[no-any-return]
