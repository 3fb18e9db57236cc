"""Rules for Swin and Swin-V2: attention in windows, one key per window position."""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import RelPosBias, RelPosMlp
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer import WindowAttention as SwinAttention
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.swin_transformer_v2 import WindowAttention as SwinV2Attention
from torch import Tensor, nn

from .._typing import Size2
from ..errors import UnsupportedHostError
from ..layers import TokenMixer
from .host import HostRule, Site, packed_bias, register_host_rule
from .keys import forked_random


class BiasedMixer(nn.Module):
    """A mixer with the host's relative position bias: a module of timm's, or None."""

    def __init__(self, mixer: TokenMixer, rel_pos: Any) -> None:
        super().__init__()
        self.mixer = mixer
        self.rel_pos = rel_pos

    def set_window_size(self, window_size: Size2) -> None:
        """Rebuild key and bias for another grid."""
        height, width = window_size
        self.mixer.set_input_size((height, width))
        if self.rel_pos is not None:
            self.rel_pos.set_window_size(window_size)


class WindowMixer(BiasedMixer):
    """A mixer of windows, called as Swin's blocks call their attention."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix the tokens of every window.

        Args:
            x: Windows, (B * windows, N, dim).
            mask: What the cyclic shift forbids, (windows, N, N), added to the logits.

        Returns:
            In the shape of ``x``.
        """
        bias = self.rel_pos.get_bias()
        if mask is not None:
            bias = (bias + mask.unsqueeze(1)).repeat(x.shape[0] // mask.shape[0], 1, 1, 1)
        return self.mixer(x, attn_mask=bias)


class CosineQuery(nn.Module):
    """Swin-V2's side of the query: unit length, times a learned factor per head.

    With unit-normal keys of length sqrt(d) and logits scaled by d**-0.5, logits start as the cosine times that
    factor, as in the host.

    Args:
        logit_scale: Logarithm of the factor, (h, 1, 1).
    """

    def __init__(self, logit_scale: Tensor) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(logit_scale.detach().clone(), requires_grad=logit_scale.requires_grad)

    def forward(self, query: Tensor) -> Tensor:
        """(B, h, N, d) to the same."""
        factor = self.logit_scale.clamp(max=math.log(100.0)).exp()
        return F.normalize(query, dim=-1) * factor


class CosineKey(nn.Module):
    """Swin-V2's side of a dynamic key: length sqrt(d), which the logits' scale undoes."""

    def forward(self, key: Tensor) -> Tensor:
        """(B, h, N, d) to the same."""
        return F.normalize(key, dim=-1) * math.sqrt(key.shape[-1])


class PositionMlp(RelPosMlp):  # type: ignore[misc]
    """timm's continuous position bias, also for windows of one token along an axis, where it divides 0 by 0."""

    def _init_buffers(self) -> None:
        super()._init_buffers()
        self.rel_coords_log.nan_to_num_(0.0)


def swin_sites(model: SwinTransformer | SwinTransformerV2) -> dict[str, Site]:
    """The window attention of every block."""
    sites = {}
    for stage_index, stage in enumerate(model.layers):
        for index, block in enumerate(stage.blocks):
            name, attn = f"layers.{stage_index}.blocks.{index}.attn", block.attn
            if isinstance(attn, WindowMixer):
                windows = _window(attn.mixer.feat_size, block)["windows"]
                sites[name] = Site.of_mixer(
                    attn.mixer, wrap=partial(WindowMixer, rel_pos=attn.rel_pos), needs_map=True, windows=windows
                )
            elif type(attn) is SwinAttention:
                sites[name] = Site.of(
                    attn,
                    wrap=partial(WindowMixer, rel_pos=bias_table(attn)),
                    needs_map=True,
                    **_window(attn.window_size, block),
                )
            elif type(attn) is SwinV2Attention:
                bias = packed_bias(attn.q_bias, attn.v_bias)
                sites[name] = Site.of(
                    attn,
                    qkv_bias=bias,
                    q_norm=CosineQuery(attn.logit_scale),
                    k_norm=CosineKey(),
                    wrap=partial(WindowMixer, rel_pos=bias_mlp(attn)),
                    needs_map=True,
                    **_window(attn.window_size, block),
                )
            else:
                raise UnsupportedHostError(f"{name} is a {type(attn).__name__}; supported: Swin's WindowAttention")
    return sites


def _window(window_size: Size2, block: Any) -> dict[str, Any]:
    counts = [-(-extent // window) for extent, window in zip(block.input_resolution, window_size, strict=True)]
    height, width = window_size
    return {"feat_size": (height, width), "windows": math.prod(counts)}


@torch.no_grad()
def bias_table(attn: Any, num_prefix_tokens: int = 0) -> RelPosBias:
    """The relative position bias of an attention of Swin's or BEiT's."""
    table = attn.relative_position_bias_table
    with forked_random(table):
        rel_pos = RelPosBias(
            tuple(attn.window_size), attn.num_heads, num_prefix_tokens, device=table.device, dtype=table.dtype
        )
    rel_pos.relative_position_bias_table.copy_(table).requires_grad_(table.requires_grad)
    return rel_pos


def bias_mlp(attn: Any) -> RelPosMlp:
    """The continuous position bias of an attention of Swin-V2's."""
    first, last = attn.cpb_mlp[0], attn.cpb_mlp[2]
    with forked_random(first.weight):
        rel_pos = PositionMlp(
            tuple(attn.window_size),
            attn.num_heads,
            hidden_dim=first.out_features,
            mode="swin",
            pretrained_window_size=getattr(attn, "pretrained_window_size", (0, 0)),
            device=first.weight.device,
            dtype=first.weight.dtype,
        )
    rel_pos.mlp.drop1.p = 0.0  # the host's has none
    for new, own in ((rel_pos.mlp.fc1, first), (rel_pos.mlp.fc2, last)):
        new.load_state_dict(own.state_dict())
        for name, parameter in own.named_parameters():
            new.get_parameter(name).requires_grad_(parameter.requires_grad)
    return rel_pos


register_host_rule(HostRule(host=SwinTransformer, sites=swin_sites))
register_host_rule(HostRule(host=SwinTransformerV2, sites=swin_sites))
