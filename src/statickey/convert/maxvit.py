"""The rule for MaxViT, CoAtNet and MaxxViT: a key per position of a window, a strided grid or the map."""

from collections.abc import Iterator
from typing import Any

from timm.models.maxxvit import (
    Attention2d,
    AttentionCl,
    MaxxVit,
    ParallelPartitionAttention,
    PartitionAttention2d,
    PartitionAttentionCl,
    TransformerBlock2d,
)
from torch import Tensor, nn

from .._typing import InputFmt, Size2
from .host import Site
from .places import FollowingHost, Place, PlacedMixer, biased, parts_first, register_placed_rule


class SharedBiasMixer(PlacedMixer):
    """A mixer whose host may hand it one position bias for all layers."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """(B, N, dim), or a map, to the same with the channels of the output."""
        bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
        return self.mixer(x, attn_mask=bias)


def maxvit_places(model: MaxxVit) -> dict[str, Place]:
    """The attention of every transformer block and partition."""
    feat_size = tuple(extent // model.stem.stride for extent in model.img_size)
    places = {}
    for index, stage in enumerate(model.stages):
        height, width = ((extent - 1) // 2 + 1 for extent in feat_size)
        feat_size = (height, width)
        for name, module in stage.named_modules(prefix=f"stages.{index}"):
            for attribute, grid in _attention_of(module, feat_size):
                windows = (height // grid[0]) * (width // grid[1])
                places[f"{name}.{attribute}"] = Place(
                    module=getattr(module, attribute), feat_size=grid, windows=windows
                )
    return places


def _attention_of(module: nn.Module, feat_size: Size2) -> Iterator[tuple[str, Size2]]:
    if isinstance(module, TransformerBlock2d):
        yield "attn", feat_size
    elif isinstance(module, PartitionAttentionCl | PartitionAttention2d):
        yield "attn", module.partition_size
    elif isinstance(module, ParallelPartitionAttention):
        yield "attn_block", module.partition_size
        yield "attn_grid", module.partition_size


def _read(attn: Any, place: Place) -> Site:
    fmt: InputFmt = "NCHW" if isinstance(attn, Attention2d) else "NHWC"
    weight, bias = attn.qkv.weight, attn.qkv.bias
    if attn.head_first:
        widths = (attn.num_heads, *[attn.dim_head] * 3)
        weight, bias = parts_first(weight, *widths), None if bias is None else parts_first(bias, *widths)
    return Site.of(
        attn, qkv_weight=weight, qkv_bias=bias, input_fmt=fmt, **biased(SharedBiasMixer, attn.rel_pos), **place.tokens
    )


register_placed_rule(MaxxVit, maxvit_places, {Attention2d: _read, AttentionCl: _read}, FollowingHost)
