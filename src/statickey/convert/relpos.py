"""Rules for hosts with a relative position bias: relative-position ViT, Swin-V2-CR and the local half of GCViT."""

import math
from copy import deepcopy
from typing import Any

import torch
from timm.models.gcvit import GlobalContextVit, GlobalContextVitBlock, WindowAttentionGlobal
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr, WindowMultiHeadAttention
from timm.models.vision_transformer_relpos import RelPosAttention, VisionTransformerRelPos
from torch import Tensor, nn

from .._typing import Size2
from .host import Site
from .maxvit import SharedBiasMixer
from .places import FollowingHost, Place, PlacedMixer, biased, register_placed_rule
from .windows import CosineKey, CosineQuery, WindowMixer


class LogOffsetBias(nn.Module):
    """Swin-V2-CR's position bias: a perceptron of the logarithm of the distance of two positions.

    Args:
        meta_mlp: From (rows, columns) to a bias per head.
        window_size: The grid (H, W).
    """

    offsets: Tensor

    def __init__(self, meta_mlp: nn.Module, window_size: Size2) -> None:
        super().__init__()
        self.meta_mlp = deepcopy(meta_mlp)
        self.register_buffer("offsets", torch.empty(0), persistent=False)
        self.set_window_size(window_size)

    def set_window_size(self, window_size: Size2) -> None:
        """Bias another grid, (H, W)."""
        like = next(self.meta_mlp.parameters())
        rows, cols = (torch.arange(extent, device=like.device) for extent in window_size)
        positions = torch.stack([rows.repeat_interleave(len(cols)), cols.repeat(len(rows))], dim=-1)
        offsets = (positions[:, None] - positions).to(like.dtype)
        self.offsets = offsets.sign() * offsets.abs().log1p()

    def get_bias(self) -> Tensor:
        """(1, h, N, N)."""
        bias: Tensor = self.meta_mlp(self.offsets.flatten(0, 1))
        return bias.T.reshape(1, -1, *self.offsets.shape[:2])


class LocalMixer(PlacedMixer):
    """A mixer called as GCViT's blocks call their attention; a local one has no use for the global query."""

    def forward(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        """(B * windows, N, dim) to the same."""
        return self.mixer(x, attn_mask=self.rel_pos.get_bias())


def _read_relpos(attn: Any, place: Place) -> Site:
    parts = {"q_norm": attn.q_norm, "k_norm": attn.k_norm}
    return Site.of(attn, **parts, **(biased(SharedBiasMixer, attn.rel_pos) | {"needs_map": True}), **place.tokens)


def _read_cr(attn: Any, place: Place) -> Site:
    return Site.of(
        attn,
        q_norm=CosineQuery(attn.logit_scale[:, None, None]),
        k_norm=CosineKey(),
        **biased(WindowMixer, LogOffsetBias(attn.meta_mlp, place.feat_size)),
        **place.tokens,
    )


def _read_gcvit(attn: Any, place: Place) -> Site:
    return Site.of(attn, **biased(LocalMixer, attn.rel_pos), **place.tokens)


def relpos_places(model: VisionTransformerRelPos) -> dict[str, Place]:
    """The blocks."""
    grid, prefix = model.patch_embed.grid_size, model.num_prefix_tokens
    return {
        f"blocks.{index}.attn": Place(module=block.attn, feat_size=grid, num_prefix_tokens=prefix)
        for index, block in enumerate(model.blocks)
    }


def cr_places(model: SwinTransformerV2Cr) -> dict[str, Place]:
    """The windows of every block."""
    places = {}
    for index, stage in enumerate(model.stages):
        for number, block in enumerate(stage.blocks):
            pairs = zip(block.feat_size, block.window_size, strict=True)
            windows = math.prod(-(-extent // window) for extent, window in pairs)
            places[f"stages.{index}.blocks.{number}.attn"] = Place(
                module=block.attn, feat_size=block.window_size, windows=windows
            )
    return places


def gcvit_places(model: GlobalContextVit) -> dict[str, Place]:
    """The local blocks; in the others the query is no token's but the image's, whatever the key: they stay."""
    places = {}
    for name, block in model.named_modules():
        if isinstance(block, GlobalContextVitBlock) and not getattr(block.attn, "use_global", False):
            places[f"{name}.attn"] = Place(module=block.attn, feat_size=block.window_size, windows=block.num_windows)
    return places


register_placed_rule(VisionTransformerRelPos, relpos_places, {RelPosAttention: _read_relpos}, FollowingHost)
register_placed_rule(SwinTransformerV2Cr, cr_places, {WindowMultiHeadAttention: _read_cr}, FollowingHost)
register_placed_rule(GlobalContextVit, gcvit_places, {WindowAttentionGlobal: _read_gcvit})
