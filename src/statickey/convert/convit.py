"""The rule for ConViT: heads that add a fixed map of positions to attention, by a gate."""

from copy import deepcopy
from typing import Any

import torch
from timm.models.convit import GPSA, MHSA, ConVit
from torch import Tensor, nn

from .._typing import Size2
from ..layers import HeadMix
from .host import Site
from .places import Place, register_placed_rule


class PositionGate(HeadMix):
    """Mixes each head's weights with a learned map of positions.

    Args:
        pos_proj: From an offset (columns, rows, squared distance) to a logit per head.
        gating_param: Share of that map, before the sigmoid, (h,).
        feat_size: The grid (H, W).
    """

    of_tokens = True
    offsets: Tensor

    def __init__(self, pos_proj: nn.Module, gating_param: Tensor, feat_size: Size2) -> None:
        nn.Module.__init__(self)
        self.pos_proj = deepcopy(pos_proj)
        self.gating_param = nn.Parameter(gating_param.detach().clone(), requires_grad=gating_param.requires_grad)
        height, width = feat_size
        rows, cols = (torch.arange(extent, device=gating_param.device) for extent in feat_size)
        y, x = (axis.to(gating_param.dtype) for axis in (rows.repeat_interleave(width), cols.repeat(height)))
        dx, dy = x - x[:, None], y - y[:, None]
        self.register_buffer("offsets", torch.stack([dx, dy, dx**2 + dy**2], dim=-1), persistent=False)

    def logits(self, logits: Tensor) -> Tensor:
        """Unchanged."""
        return logits

    def weights(self, weights: Tensor) -> Tensor:
        """(B, h, N, N) to the same; rows sum to one."""
        positions: Tensor = self.pos_proj(self.offsets).movedim(-1, 0).softmax(dim=-1)
        share = self.gating_param.sigmoid()[:, None, None]
        return (1 - share) * weights + share * positions


def _read_gated(attn: Any, place: Place) -> Site:
    weight = torch.cat([attn.qk.weight, attn.v.weight])
    bias = None if attn.v.bias is None else torch.cat([attn.qk.bias, attn.v.bias])
    gate = PositionGate(attn.pos_proj, attn.gating_param, place.feat_size)
    return Site.of(attn, qkv_weight=weight, qkv_bias=bias, head_mix=gate, **place.tokens)


def _read_plain(attn: Any, place: Place) -> Site:
    return Site.of(attn, **place.tokens)


def convit_places(model: ConVit) -> dict[str, Place]:
    """The blocks; the class token joins after the gated ones."""
    return {
        f"blocks.{index}.attn": Place(
            module=block.attn,
            feat_size=model.patch_embed.grid_size,
            num_prefix_tokens=int(index >= model.local_up_to_layer),
        )
        for index, block in enumerate(model.blocks)
    }


register_placed_rule(ConVit, convit_places, {GPSA: _read_gated, MHSA: _read_plain})
