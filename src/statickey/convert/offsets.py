"""Rules for hosts with a bias per distance along both axes: LeViT, TinyViT and EfficientFormer."""

from typing import Any

import torch
from timm.layers import resize_rel_pos_bias_table_levit
from timm.models.efficientformer import Attention as EfficientFormerAttention
from timm.models.efficientformer import EfficientFormer
from timm.models.levit import Attention as LevitAttention
from timm.models.levit import Levit
from timm.models.tiny_vit import Attention as TinyVitAttention
from timm.models.tiny_vit import TinyVit, TinyVitBlock
from torch import Tensor, nn

from .._typing import Size2
from ..layers import TokenMixer
from .host import Site
from .places import (
    MapHost,
    MapMixer,
    Place,
    biased,
    map_grid,
    parts_first,
    register_placed_rule,
    selected_norm,
)


class OffsetBias(nn.Module):
    """A learned bias per head for each distance (rows, columns) of two positions.

    Args:
        table: The biases, (h, H*W).
        window_size: The grid (H, W).
    """

    index: Tensor

    def __init__(self, table: Tensor, window_size: Size2) -> None:
        super().__init__()
        self.window_size = window_size
        self.attention_biases = nn.Parameter(table.detach().clone(), requires_grad=table.requires_grad)
        self.register_buffer("index", self._index(), persistent=False)

    def _index(self) -> Tensor:
        height, width = self.window_size
        device = self.attention_biases.device
        rows, cols = (torch.arange(extent, device=device) for extent in (height, width))
        y, x = rows.repeat_interleave(width), cols.repeat(height)
        return (y[:, None] - y).abs() * width + (x[:, None] - x).abs()

    def set_window_size(self, window_size: Size2) -> None:
        """Resample the biases to another grid, (H, W)."""
        if window_size == self.window_size:
            return
        old = self.attention_biases
        size = (window_size[0] * window_size[1], old.shape[0])
        table = resize_rel_pos_bias_table_levit(old.detach().T, size).T.contiguous()
        self.attention_biases = nn.Parameter(table, requires_grad=old.requires_grad)
        self.window_size = window_size
        self.index = self._index()

    def get_bias(self) -> Tensor:
        """(1, h, N, N)."""
        return self.attention_biases[:, self.index].unsqueeze(0)


class PreNormMixer(MapMixer):
    """A mixer behind a norm that the host keeps inside its attention."""

    def __init__(self, mixer: TokenMixer, rel_pos: nn.Module | None, norm: nn.Module) -> None:
        super().__init__(mixer, rel_pos)
        self.norm = norm

    def parts(self) -> dict[str, Any]:
        """The position bias and the norm."""
        return {"rel_pos": self.rel_pos, "norm": self.norm}

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim) to the same."""
        return super().forward(self.norm(x))


def _offset_bias(attn: Any, place: Place) -> OffsetBias:
    return OffsetBias(attn.attention_biases, place.feat_size)


def _head_by_head(attn: Any) -> tuple[int, int, int, int]:
    return attn.num_heads, attn.key_dim, attn.key_dim, attn.val_dim


def read_levit(attn: Any, place: Place) -> Site:
    """LeViT's attention: batch norms behind both projections, an activation before the second."""
    widths, qkv, last = _head_by_head(attn), attn.qkv, attn.proj.ln
    return Site.of(
        attn,
        input_fmt="NCHW" if attn.use_conv else "NLC",
        value_dim=attn.val_dim,
        qkv_weight=parts_first(qkv.linear.weight, *widths),
        qkv_norm=selected_norm(qkv.bn, lambda rows: parts_first(rows, *widths)),
        out_norm=attn.proj.act,
        proj=last.linear,
        proj_norm=last.bn,
        **biased(MapMixer, _offset_bias(attn, place)),
        **place.tokens,
    )


def _read_plain(attn: Any, place: Place, **kept: Any) -> Site:
    widths = _head_by_head(attn)
    return Site.of(
        attn,
        value_dim=attn.val_dim,
        qkv_weight=parts_first(attn.qkv.weight, *widths),
        qkv_bias=parts_first(attn.qkv.bias, *widths),
        **kept,
        **place.tokens,
    )


def read_efficientformer(attn: Any, place: Place) -> Site:
    """EfficientFormer's attention: values wider than keys."""
    return _read_plain(attn, place, **biased(MapMixer, _offset_bias(attn, place)))


def read_tinyvit(attn: Any, place: Place) -> Site:
    """TinyViT's attention: a norm before the projection."""
    return _read_plain(attn, place, **biased(PreNormMixer, _offset_bias(attn, place), norm=attn.norm))


def levit_places(model: Levit) -> dict[str, Place]:
    """The blocks of every stage; attention between stages, whose queries are every other token, stays dynamic."""
    places = {}
    for index, (stage, grid) in enumerate(zip(model.stages, _levit_grids(model), strict=True)):
        for number, block in enumerate(stage.blocks):
            places[f"stages.{index}.blocks.{number}.attn"] = Place(module=block.attn, feat_size=grid)
    return places


def _levit_grids(model: Levit) -> list[Size2]:
    """The grid of each stage, from the attention between stages or a block that is left; from a mixer else."""
    grids = []
    for stage in model.stages:
        module = stage.blocks[0].attn
        height, width = module.resolution if isinstance(module, LevitAttention) else module.mixer.feat_size
        grids.append((height, width))
    return grids


def efficientformer_places(model: EfficientFormer) -> dict[str, Place]:
    """The blocks of tokens at the end of the last stage; timm builds their bias for 7 x 7."""
    places = {}
    for index, stage in enumerate(model.stages):
        for number, block in enumerate(stage.blocks):
            module = getattr(block, "token_mixer", None)
            if isinstance(module, EfficientFormerAttention | MapMixer):
                places[f"stages.{index}.blocks.{number}.token_mixer"] = Place(module=module, feat_size=(7, 7))
    return places


def tinyvit_places(model: TinyVit) -> dict[str, Place]:
    """The windows of every block."""
    places = {}
    for index, stage in enumerate(model.stages):
        height, width = map_grid(model, model.feature_info[index]["reduction"])
        for name, block in stage.named_modules(prefix=f"stages.{index}"):
            if isinstance(block, TinyVitBlock):
                size = block.window_size
                windows = -(-height // size) * -(-width // size)
                places[f"{name}.attn"] = Place(module=block.attn, feat_size=(size, size), windows=windows)
    return places


register_placed_rule(Levit, levit_places, {LevitAttention: read_levit})
register_placed_rule(EfficientFormer, efficientformer_places, {EfficientFormerAttention: read_efficientformer})
register_placed_rule(TinyVit, tinyvit_places, {TinyVitAttention: read_tinyvit}, MapHost)
