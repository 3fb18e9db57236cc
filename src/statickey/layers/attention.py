"""Mixers that weigh values by a softmax over keys, whatever the keys are."""

import math
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_scale
from .._typing import Backend, Size2
from ..errors import BackendError, FeatSizeError, StaticKeyError
from ..ops import rotate, static_key_attention, static_key_weights, unfold_queries
from .mixer import TokenMixer
from .parts import HeadMix, Reduction

AttendOp = Callable[..., Tensor]
"""``op(query, key, value, key_bias=, query_offset=, unfold=)``: the attention, or its map, of a mixer."""

Rotate = Callable[[Tensor], Tensor]
"""Turns vectors of all tokens, (..., P + H*W, d), by their places; changes nothing where there is no rotation."""


class AttentionMixer(TokenMixer):
    """A mixer that weighs values by ``softmax(scale * query . key)``; subclasses bring the key.

    Attributes: ``scale``, the factor on the logits, or ``log_temperature`` where it is learned, else None;
    ``mask_diagonal``; ``backend``, that of ``static_key_attention``, whose limits it has. What a host had around its
    attention is kept by ``convert``: ``q_norm``, applied to each head's query; ``out_norm``, applied before ``proj``;
    ``gate``, a Linear layer whose sigmoid multiplies what ``proj`` gets, else None; ``head_mix``, a ``HeadMix``, else
    None; ``rotate_half``, how a rotary position embedding pairs channels: the two halves, or neighbours;
    ``query_bias``, a position bias that a query makes, (B, h, N, d) to (B, h, N, N), else None; ``value_dim``, the
    width of a head's value, that of its key unless ``set_widths`` says otherwise; ``tokens_per_query``, how many
    tokens ``q_norm`` makes one query of, mostly 1; ``reduction``, what a host makes of the tokens before it projects
    them to keys and values, else None.
    """

    rotates = True

    log_temperature: nn.Parameter | None

    def _build(self, qkv_bias: bool, proj_bias: bool, factory: dict[str, Any]) -> None:
        self.value_dim = self.head_dim
        self.tokens_per_query = 1
        self.reduction: Reduction | None = None
        self.scale: float = self.head_dim**-0.5
        self.mask_diagonal = False
        self.backend: Backend = "sdpa"
        self.register_parameter("log_temperature", None)
        self.q_norm: nn.Module = nn.Identity()
        self.head_mix: HeadMix | None = None
        self.query_bias: nn.Module | None = None
        self.out_norm: nn.Module = nn.Identity()
        self.gate: nn.Module | None = None
        self.rotate_half = False
        self.proj: nn.Module = nn.Linear(self.num_heads * self.head_dim, self.dim, bias=proj_bias, **factory)

    def _set_logits(
        self, scale: float | None, learned_temperature: bool, mask_diagonal: bool, factory: dict[str, Any]
    ) -> None:
        """Take over the options that only some constructors have."""
        if scale is not None:
            check_scale(scale)
            self.scale = scale
        if learned_temperature:
            if self.scale <= 0:
                raise StaticKeyError(f"learned_temperature=True needs a positive scale, got scale={scale}")
            self.log_temperature = nn.Parameter(torch.empty((), **factory))
            AttentionMixer.reset_parameters(self)
        if mask_diagonal and self.num_tokens < 2:
            raise StaticKeyError(f"mask_diagonal=True leaves nothing to attend to on {self.num_tokens} token")
        self.mask_diagonal = mask_diagonal

    def set_reduction(self, reduction: Reduction) -> None:
        """Take keys and values from fewer tokens, which a host makes; what is tied to a grid is made for those.

        Args:
            reduction: Makes them.

        Raises:
            StaticKeyError: The mixer has no key of its own, or prefix tokens.
        """
        raise StaticKeyError(f"{type(self).__name__} has no key to take from fewer tokens; use mhsa or a static key")

    def set_widths(self, value_dim: int, out_dim: int | None) -> None:
        """Give values and outputs widths of their own, as a host has them, behind fresh projections.

        Args:
            value_dim: Width of a head's value.
            out_dim: Channels of the output; None for the heads' values, without an output projection.
        """
        for name in ("qkv", "qv", "v"):
            old = getattr(self, name, None)
            if isinstance(old, nn.Linear):
                rows = old.out_features + self.num_heads * (value_dim - self.value_dim)
                setattr(self, name, _linear_like(old, old.in_features, rows))
        self.value_dim = value_dim
        inner = self.num_heads * value_dim
        self.proj = nn.Identity() if out_dim is None else _linear_like(self.proj, inner, out_dim)

    def reset_parameters(self) -> None:
        """Initialise the temperature, if it is learned; projections initialise themselves."""
        if self.log_temperature is not None:
            nn.init.constant_(self.log_temperature, math.log(self.scale))

    def attention_weights(
        self,
        x: Tensor,
        feat_size: Size2 | None = None,
        *,
        attn_mask: Tensor | None = None,
        rope: Tensor | None = None,
        pos_embed: Tensor | None = None,
    ) -> Tensor:
        """The attention map of every head, always computed and stored in full.

        Args:
            x: As in ``forward``.
            feat_size: As in ``forward``.
            attn_mask: As in ``forward``.
            rope: As in ``forward``.
            pos_embed: As in ``forward``.

        Returns:
            (B, h, N, N), rows sum to one (unless heads are mixed after the softmax).
        """
        x, feat_size = self._tokens(x, feat_size)
        if self._tiles(feat_size):
            raise FeatSizeError(
                f"off_grid='window' has no single attention map on feat_size={feat_size}; "
                f"ask for it on feat_size={self.feat_size}"
            )
        self._check_positions(feat_size, rope, pos_embed)
        op = partial(self._call_op, attn_mask=attn_mask, as_map=True)
        return self._attend(x, feat_size, op, self._rotation(rope), pos_embed)

    def _mix(
        self,
        x: Tensor,
        feat_size: Size2,
        attn_mask: Tensor | None,
        rope: Tensor | None = None,
        pos_embed: Tensor | None = None,
    ) -> Tensor:
        own_keys = self.query_bias is not None or (self.head_mix is not None and self.head_mix.of_tokens)
        unmasked = attn_mask is None and not own_keys
        if not unmasked and self._tiles(feat_size):
            raise FeatSizeError(
                f"a mask or position bias needs one map of all tokens, off_grid='window' tiles feat_size={feat_size}"
            )
        attend = self._attend_unmasked if unmasked else self._attend
        out = attend(x, feat_size, partial(self._call_op, attn_mask=attn_mask), self._rotation(rope), pos_embed)
        out = out.transpose(1, 2).flatten(2)
        out = self.out_norm(out)
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))  # type: ignore[no-any-return]

    def _rotation(self, rope: Tensor | None) -> Rotate:
        """What turns queries and keys of all tokens."""
        if rope is None:
            return _stay
        return partial(rotate, rope=rope, half=self.rotate_half, num_prefix_tokens=self.num_prefix_tokens)

    def _tiles(self, feat_size: Size2) -> bool:
        """Whether attention on this grid is split into windows."""
        return False

    def _attention_macs(
        self, num_tokens: int, num_logits: int, key_width: int, num_projections: int, num_values: int | None = None
    ) -> int:
        """Projections, logits against keys of one width, head mixing, values, gate and output projection.

        Keys and values come from ``num_values`` tokens, by default from all.
        """
        num_values = num_tokens if num_values is None else num_values
        inner, values = self.num_heads * self.head_dim, self.num_heads * self.value_dim
        mixing = 0 if self.head_mix is None else 2 * self.num_heads**2 * num_logits
        num_logits //= self.tokens_per_query
        products = self.num_heads * num_logits * (key_width + self.value_dim)
        out_dim = self.proj.out_features if isinstance(self.proj, nn.Linear) else 0
        queries, keys = int(num_projections > 1), int(num_projections > 2)
        projections = self.dim * (num_tokens * inner * queries + num_values * (inner * keys + values))
        projections += 0 if self.gate is None else num_tokens * self.dim * values
        return projections + num_tokens // self.tokens_per_query * values * out_dim + products + mixing

    @abstractmethod
    def _attend(
        self, x: Tensor, feat_size: Size2, op: AttendOp, turn: Rotate, pos_embed: Tensor | None = None
    ) -> Tensor:
        """Project, turn and call ``op(query, key, value, key_bias=, query_offset=)``; (B, h, N, ...)."""

    def _attend_unmasked(
        self, x: Tensor, feat_size: Size2, op: AttendOp, turn: Rotate, pos_embed: Tensor | None = None
    ) -> Tensor:
        """What ``_attend`` computes, where neither a mask nor the map is asked for."""
        return self._attend(x, feat_size, op, turn, pos_embed)

    def _logit_scale(self) -> float | Tensor:
        return self.scale if self.log_temperature is None else self.log_temperature.exp()

    def _call_op(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_bias: Tensor | None = None,
        query_offset: int = 0,
        unfold: tuple[Size2, int] | None = None,
        key_count: Tensor | None = None,
        attn_mask: Tensor | None = None,
        as_map: bool = False,
    ) -> Tensor:
        """Attend, or return the map with ``as_map``."""
        if self.query_bias is not None:
            bias = self.query_bias(query)
            attn_mask = bias if attn_mask is None else bias + attn_mask
        options: dict[str, Any] = {
            "key_bias": key_bias,
            "scale": self._logit_scale(),
            "mask_diagonal": self.mask_diagonal,
            "query_offset": query_offset,
            "attn_mask": _query_rows(attn_mask, query_offset, query.shape[2]),
            "key_count": key_count,
        }
        dropout_p = self.attn_drop.p if self.training else 0.0
        mix = self.head_mix
        if not as_map and mix is None:
            return static_key_attention(
                query, key, value, **options, dropout_p=dropout_p, unfold=unfold, backend=self.backend
            )
        if not as_map and self.backend == "triton":
            raise BackendError("backend='triton' makes no map that talking heads could mix; use backend='sdpa'")
        query = query if unfold is None else unfold_queries(query, *unfold)
        weights = static_key_weights(query, key, **options, head_mix=None if mix is None else mix.logits)
        weights = weights if mix is None else mix.weights(weights)
        return weights if as_map else F.dropout(weights, dropout_p) @ value

    def _split_heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(B, N, parts*h*d) to ``parts`` tensors (B, h, N, d), of which the last may have a width of its own."""
        batch, tokens, channels = x.shape
        if parts > 1 and self.value_dim != self.head_dim:
            keys = self.num_heads * self.head_dim
            split = x.split_with_sizes([*[keys] * (parts - 1), self.num_heads * self.value_dim], dim=-1)
            shape = (batch, tokens, self.num_heads)
            return tuple(part.reshape(*shape, part.shape[-1] // self.num_heads).transpose(1, 2) for part in split)
        heads = x.reshape(batch, tokens, parts, self.num_heads, channels // (parts * self.num_heads))
        return heads.permute(2, 0, 3, 1, 4).unbind(0)


def with_pos_embed(x: Tensor, pos_embed: Tensor | None) -> Tensor:
    """What queries and keys are projected from."""
    return x if pos_embed is None else x + pos_embed


def _stay(vectors: Tensor) -> Tensor:
    return vectors


def _query_rows(attn_mask: Tensor | None, first_token: int, num_queries: int) -> Tensor | None:
    """The rows of a mask that belong to consecutive queries."""
    if attn_mask is None or attn_mask.ndim < 2 or attn_mask.shape[-2] in (1, num_queries):
        return attn_mask
    return attn_mask[..., first_token : first_token + num_queries, :]


def _linear_like(old: nn.Module, in_features: int, out_features: int) -> nn.Linear:
    """A fresh linear layer of other widths, with a bias where the old one has it."""
    bias, weight = old.bias is not None, old.weight
    return nn.Linear(in_features, out_features, bias=bias, device=weight.device, dtype=weight.dtype)


def is_plain(linear: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer is its weight and bias and nothing else."""
    return type(linear) is nn.Linear and not (linear._forward_pre_hooks or linear._forward_hooks)


def linear_rows(linear: nn.Module, x: Tensor, rows: slice) -> Tensor:
    """Some outputs of a linear layer; of what stands in for one, or has hooks, all are made and these cut out."""
    if not is_plain(linear):
        return linear(x)[..., rows]  # type: ignore[no-any-return]
    return F.linear(x, linear.weight[rows], None if linear.bias is None else linear.bias[rows])
