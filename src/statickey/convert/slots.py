"""Empty places for mixers, which a host is built with when nothing of its own attention is wanted."""

from collections.abc import Callable
from typing import Any

from timm.models.metaformer import Attention as MetaFormerAttention
from torch import Tensor, nn

from ..errors import StaticKeyError


class MixerSlot(nn.Module):
    """An empty place for a mixer, given to a host as its attention class; it remembers what the host asked for.

    A host built with slots draws the same random numbers whatever mixers will stand in it.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        nn.Module.__init__(self)
        self.dim = dim
        self.num_heads = num_heads
        self.qkv_bias = qkv_bias
        self.proj_bias = proj_bias
        self.attn_drop = attn_drop
        self.proj_drop = proj_drop
        self.q_norm = self.out_norm = None
        if norm_layer is not None and qk_norm:
            self.q_norm = norm_layer(dim // num_heads, device=device, dtype=dtype)
        if norm_layer is not None and scale_norm:
            self.out_norm = norm_layer(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Refuse: a slot is filled before the model runs."""
        raise StaticKeyError("an empty mixer slot cannot run; fill it with statickey.convert")


class MapSlot(MixerSlot):
    """A slot in a MetaFormer stage of maps."""

    def __init__(
        self,
        dim: int,
        *,
        qkv_bias: bool = False,
        proj_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(dim, qkv_bias=qkv_bias, proj_bias=proj_bias, attn_drop=attn_drop, proj_drop=proj_drop)


class TokenSlot(MapSlot, MetaFormerAttention):  # type: ignore[misc]
    """A slot in a MetaFormer stage of tokens, which the stage recognises by this base class."""
