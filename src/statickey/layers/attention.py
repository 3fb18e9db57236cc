"""Mixers that weigh values by a softmax over keys, whatever the keys are."""

import math
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_scale
from .._typing import Backend, Size2
from ..errors import BackendError, FeatSizeError, StaticKeyError
from ..ops import rotate, static_key_attention, static_key_weights, unfold_queries
from .mixer import TokenMixer
from .parts import HeadMix

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
    None; ``rotate_half``, how a rotary position embedding pairs channels: the two halves, or neighbours.
    """

    rotates = True

    log_temperature: nn.Parameter | None

    def _build(self, qkv_bias: bool, proj_bias: bool, factory: dict[str, Any]) -> None:
        self.scale: float = self.head_dim**-0.5
        self.mask_diagonal = False
        self.backend: Backend = "sdpa"
        self.register_parameter("log_temperature", None)
        self.q_norm: nn.Module = nn.Identity()
        self.head_mix: HeadMix | None = None
        self.out_norm: nn.Module = nn.Identity()
        self.gate: nn.Module | None = None
        self.rotate_half = False
        self.proj = nn.Linear(self.num_heads * self.head_dim, self.dim, bias=proj_bias, **factory)

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
    ) -> Tensor:
        """The attention map of every head, always computed and stored in full.

        Args:
            x: As in ``forward``.
            feat_size: As in ``forward``.
            attn_mask: As in ``forward``.
            rope: As in ``forward``.

        Returns:
            (B, h, N, N), rows sum to one (unless heads are mixed after the softmax).
        """
        x, feat_size = self._tokens(x, feat_size)
        if self._tiles(feat_size):
            raise FeatSizeError(
                f"off_grid='window' has no single attention map on feat_size={feat_size}; "
                f"ask for it on feat_size={self.feat_size}"
            )
        if rope is not None:
            self._check_rotates(feat_size)
        op = partial(self._call_op, attn_mask=attn_mask, as_map=True)
        return self._attend(x, feat_size, op, self._rotation(rope))

    def _mix(self, x: Tensor, feat_size: Size2, attn_mask: Tensor | None, rope: Tensor | None = None) -> Tensor:
        if attn_mask is not None and self._tiles(feat_size):
            raise FeatSizeError(
                f"attn_mask needs one map of all tokens, off_grid='window' tiles feat_size={feat_size}"
            )
        attend = self._attend_unmasked if attn_mask is None else self._attend
        out = attend(x, feat_size, partial(self._call_op, attn_mask=attn_mask), self._rotation(rope))
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

    def _attention_macs(self, num_tokens: int, num_logits: int, key_width: int, num_projections: int) -> int:
        """Projections, logits against keys of one width, head mixing, values, gate and output projection."""
        inner = self.num_heads * self.head_dim
        mixing = 0 if self.head_mix is None else 2 * self.num_heads**2 * num_logits
        products = self.num_heads * num_logits * (key_width + self.head_dim)
        num_projections += 1 + (self.gate is not None)
        return num_projections * self.dim * inner * num_tokens + products + mixing

    @abstractmethod
    def _attend(self, x: Tensor, feat_size: Size2, op: AttendOp, turn: Rotate) -> Tensor:
        """Project, turn and call ``op(query, key, value, key_bias=, query_offset=)``; (B, h, N, ...)."""

    def _attend_unmasked(self, x: Tensor, feat_size: Size2, op: AttendOp, turn: Rotate) -> Tensor:
        """What ``_attend`` computes, where neither a mask nor the map is asked for."""
        return self._attend(x, feat_size, op, turn)

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
        """(B, N, parts*h*d) to ``parts`` tensors (B, h, N, d)."""
        batch, tokens, _ = x.shape
        heads = x.reshape(batch, tokens, parts, self.num_heads, self.head_dim)
        return heads.permute(2, 0, 3, 1, 4).unbind(0)


def _stay(vectors: Tensor) -> Tensor:
    return vectors


def _query_rows(attn_mask: Tensor | None, first_token: int, num_queries: int) -> Tensor | None:
    """The rows of a mask that belong to consecutive queries."""
    if attn_mask is None or attn_mask.ndim < 2 or attn_mask.shape[-2] in (1, num_queries):
        return attn_mask
    return attn_mask[..., first_token : first_token + num_queries, :]
