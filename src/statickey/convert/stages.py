"""Rules for hosts of plain tokens on several grids: PiT, TNT (pixels and patches), CrossViT (two branches)."""

from typing import Any

import torch
from timm.layers import Attention
from timm.models.crossvit import CrossVit
from timm.models.pit import PoolingVisionTransformer
from timm.models.tnt import TNT
from timm.models.tnt import Attention as TntAttention

from .host import Site
from .places import Place, register_placed_rule


def _read(attn: Any, place: Place) -> Site:
    parts = {"q_norm": attn.q_norm, "k_norm": attn.k_norm, "out_norm": attn.norm}
    return Site.of(attn, **parts, **place.tokens)


def _read_tnt(attn: Any, place: Place) -> Site:
    weight = torch.cat([attn.qk.weight, attn.v.weight])
    bias = None if attn.v.bias is None else torch.cat([attn.qk.bias, attn.v.bias])
    return Site.of(attn, qkv_weight=weight, qkv_bias=bias, **place.tokens)


def pit_places(model: PoolingVisionTransformer) -> dict[str, Place]:
    """The blocks of every stage, which has half the rows and columns of the one before."""
    height, width = model.patch_embed.grid_size
    places = {}
    for index, stage in enumerate(model.transformers):
        if stage.pool is not None:
            height, width = (-(-extent // 2) for extent in (height, width))
        for number, block in enumerate(stage.blocks):
            places[f"transformers.{index}.blocks.{number}.attn"] = Place(
                module=block.attn, feat_size=(height, width), num_prefix_tokens=model.num_tokens
            )
    return places


def tnt_places(model: TNT) -> dict[str, Place]:
    """The pixels within a patch, and the patches."""
    height, width = model.pixel_embed.grid_size
    rows, cols = model.pixel_embed.new_patch_size
    places = {}
    for index, block in enumerate(model.blocks):
        places[f"blocks.{index}.attn_in"] = Place(
            module=block.attn_in, feat_size=(rows, cols), windows=height * width
        )
        places[f"blocks.{index}.attn_out"] = Place(
            module=block.attn_out, feat_size=(height, width), num_prefix_tokens=1
        )
    return places


def crossvit_places(model: CrossVit) -> dict[str, Place]:
    """The blocks of both branches; where a branch's class token reads the other one, attention stays dynamic."""
    places = {}
    for index, stage in enumerate(model.blocks):
        for branch, (blocks, embed) in enumerate(zip(stage.blocks, model.patch_embed, strict=True)):
            size, patch = embed.img_size, embed.patch_size
            grid = (size[0] // patch[0], size[1] // patch[1])
            for number, block in enumerate(blocks):
                name = f"blocks.{index}.blocks.{branch}.{number}.attn"
                places[name] = Place(module=block.attn, feat_size=grid, num_prefix_tokens=1)
    return places


register_placed_rule(PoolingVisionTransformer, pit_places, {Attention: _read})
register_placed_rule(TNT, tnt_places, {TntAttention: _read_tnt})
register_placed_rule(CrossVit, crossvit_places, {Attention: _read})
