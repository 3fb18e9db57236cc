"""What every token mixer is: a module from tokens to tokens that knows its grid."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .._checks import check_feat_size, check_head_dim, check_no_mask, check_rate, check_tokens
from .._typing import Backend, Size2
from ..errors import StaticKeyError
from ..ops import resample_static_key, static_key_attention, static_key_weights

AttendOp = Callable[..., Tensor]


class TokenMixer(nn.Module, ABC):
    """Base of all mixers: ``mixer(x, feat_size=None)`` maps tokens (B, N, dim) to tokens (B, N, dim).

    Tokens are row-major over the grid (H, W), prefix tokens first, so N = num_prefix_tokens + H*W.

    Args:
        dim: Channels of the tokens.
        num_heads: Number of heads.
        feat_size: The token grid (H, W) the mixer is built for.
        num_prefix_tokens: Class and register tokens before the grid.
        head_dim: Width of one head; default ``dim // num_heads``.

    Raises:
        StaticKeyError: An argument is out of range, or ``num_heads`` does not divide ``dim``.
    """

    layout: ClassVar[Literal["NLC"]] = "NLC"
    """Layout of input and output: (batch, tokens, channels)."""

    grid_parameters: ClassVar[tuple[str, ...]] = ()
    """Parameters and buffers whose second axis runs over the tokens of the grid the mixer is built for."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        feat_size: Size2,
        num_prefix_tokens: int = 0,
        head_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = check_head_dim(dim, num_heads, head_dim)
        self.dim = dim
        self.num_heads = num_heads
        self.feat_size = check_feat_size(feat_size)
        if not isinstance(num_prefix_tokens, int) or num_prefix_tokens < 0:
            raise StaticKeyError(f"num_prefix_tokens={num_prefix_tokens!r} must be zero or a positive integer")
        self.num_prefix_tokens = num_prefix_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens on the grid the mixer is built for, prefix included."""
        return self.num_prefix_tokens + self.feat_size[0] * self.feat_size[1]

    def forward(
        self,
        x: Tensor,
        feat_size: Size2 | None = None,
        *,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Mix tokens.

        Args:
            x: Tokens, (B, N, dim).
            feat_size: The grid (H, W) of this input when it is not the one the mixer is built for.
            attn_mask: Accepted because timm's blocks pass it; must be None.
            is_causal: Accepted because timm's blocks pass it; must be False.

        Returns:
            (B, N, dim).

        Raises:
            FeatSizeError: The tokens do not fill the grid.
            StaticKeyError: A mask is really used.
        """
        check_no_mask(attn_mask, is_causal)
        return self._mix(x, self._check_grid(x, feat_size))

    @abstractmethod
    def _mix(self, x: Tensor, feat_size: Size2) -> Tensor:
        """Mix tokens of a checked shape."""

    def _check_grid(self, x: Tensor, feat_size: Size2 | None) -> Size2:
        feat_size = self.feat_size if feat_size is None else check_feat_size(feat_size)
        check_tokens(x, self.dim, feat_size, self.num_prefix_tokens)
        return feat_size

    def set_input_size(self, feat_size: Size2) -> None:
        """Rebuild the mixer for another grid, resampling what is tied to it; no change at the same size.

        Resampled parameters are new objects: create the optimizer afterwards.

        Args:
            feat_size: The new token grid (H, W).

        Raises:
            FeatSizeError: Not a pair of positive integers.
        """
        feat_size = check_feat_size(feat_size)
        if feat_size == self.feat_size:
            return
        for name in self.grid_parameters:
            old = getattr(self, name)
            if old is None:
                continue
            new = self._resample(old.detach(), feat_size)
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            setattr(self, name, new)
        self.feat_size = feat_size

    def _resample(self, tensor: Tensor, feat_size: Size2) -> Tensor:
        return resample_static_key(tensor, self.feat_size, feat_size, num_prefix_tokens=self.num_prefix_tokens)

    def no_weight_decay(self) -> set[str]:
        """Names of this mixer's parameters that weight decay must leave alone.

        Keys are excluded: they play the part of an activation (the key a token would have had), and decay
        would pull every attention map towards uniform.
        """
        return {name for name in self.grid_parameters if isinstance(getattr(self, name), nn.Parameter)}

    def extra_repr(self) -> str:
        """The head of the constructor, for ``print(module)``."""
        return (
            f"{self.dim}, {self.num_heads}, feat_size={self.feat_size}, "
            f"num_prefix_tokens={self.num_prefix_tokens}, head_dim={self.head_dim}"
        )


class AttentionMixer(TokenMixer):
    """A mixer that weighs values by ``softmax(scale * query . key)``; subclasses bring the key.

    Args:
        dim: Channels of the tokens.
        num_heads: Number of heads.
        feat_size: The token grid (H, W) the mixer is built for.
        num_prefix_tokens: Class and register tokens before the grid.
        head_dim: Width of one head; default ``dim // num_heads``.
        proj_bias: Whether the output projection has a bias.
        attn_drop: Dropout rate on the attention weights.
        proj_drop: Dropout rate on the output.
        scale: Factor on the logits; default ``head_dim ** -0.5``.
        learned_temperature: Learn the factor, as ``log_temperature``, starting from ``scale``.
        mask_diagonal: Tokens do not attend to themselves.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        feat_size: Size2,
        num_prefix_tokens: int = 0,
        head_dim: int | None = None,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        scale: float | None = None,
        learned_temperature: bool = False,
        mask_diagonal: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(dim, num_heads, feat_size=feat_size, num_prefix_tokens=num_prefix_tokens, head_dim=head_dim)
        check_rate(attn_drop=attn_drop, proj_drop=proj_drop)
        if mask_diagonal and self.num_tokens < 2:
            raise StaticKeyError(f"mask_diagonal=True leaves nothing to attend to on {self.num_tokens} token")
        self.scale = self.head_dim**-0.5 if scale is None else scale
        if learned_temperature and self.scale <= 0:
            raise StaticKeyError(f"learned_temperature=True needs a positive scale, got scale={scale}")
        self.mask_diagonal = mask_diagonal
        self.backend: Backend = "sdpa"
        self.log_temperature = (
            nn.Parameter(torch.empty((), device=device, dtype=dtype)) if learned_temperature else None
        )
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(self.num_heads * self.head_dim, dim, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def reset_parameters(self) -> None:
        """Initialise what this class owns; projections initialise themselves."""
        if self.log_temperature is not None:
            nn.init.constant_(self.log_temperature, torch.tensor(self.scale).log().item())

    def attention_weights(self, x: Tensor, feat_size: Size2 | None = None) -> Tensor:
        """The attention map of every head, always computed and stored in full.

        Args:
            x: Tokens, (B, N, dim).
            feat_size: As in ``forward``.

        Returns:
            (B, h, N, N), rows sum to one.
        """
        return self._attend(x, self._check_grid(x, feat_size), self._weights_op)

    def _mix(self, x: Tensor, feat_size: Size2) -> Tensor:
        out = self._attend(x, feat_size, self._attention_op)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]

    @abstractmethod
    def _attend(self, x: Tensor, feat_size: Size2, op: AttendOp) -> Tensor:
        """Project and call ``op(query, key, value, key_bias=, query_offset=)``; (B, h, N, ...)."""

    def _logit_scale(self) -> float | Tensor:
        return self.scale if self.log_temperature is None else self.log_temperature.exp()

    def _attention_op(
        self, query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None = None, query_offset: int = 0
    ) -> Tensor:
        return static_key_attention(
            query,
            key,
            value,
            key_bias=key_bias,
            scale=self._logit_scale(),
            mask_diagonal=self.mask_diagonal,
            query_offset=query_offset,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            backend=self.backend,
        )

    def _weights_op(
        self, query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None = None, query_offset: int = 0
    ) -> Tensor:
        return static_key_weights(
            query,
            key,
            key_bias=key_bias,
            scale=self._logit_scale(),
            mask_diagonal=self.mask_diagonal,
            query_offset=query_offset,
        )

    def _split_heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(B, N, parts*h*d) to ``parts`` tensors (B, h, N, d)."""
        batch, tokens, _ = x.shape
        heads = x.reshape(batch, tokens, parts, self.num_heads, self.head_dim)
        return heads.permute(2, 0, 3, 1, 4).unbind(0)
