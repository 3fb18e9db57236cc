"""Rules for hosts whose keys are fewer than their queries: PVT-v2, Twins and Next-ViT."""

import math
from typing import Any

import torch
from timm.models.nextvit import EfficientAttention, NextTransformerBlock, NextViT
from timm.models.pvt_v2 import Attention as PvtAttention
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.twins import GlobalSubSampleAttn, LocallyGroupedAttn, Twins
from torch import Tensor, nn
from torch.nn import functional as F

from .._typing import Size2
from ..layers import Reduction
from .host import Site
from .places import MapHost, Place, PlacedMixer, biased, map_grid, register_placed_rule


class ConvReduction(Reduction):
    """A strided convolution of the map, or a convolution of the map pooled to a fixed size, and a norm.

    Args:
        conv: Of (B, dim, H, W).
        norm: Of tokens.
        pool: Before the convolution, if any.
        act: After the norm, if any.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.Module, pool: Any = None, act: nn.Module | None = None) -> None:
        super().__init__()
        self.pool = pool
        self.conv = conv
        self.norm = norm
        self.act = act

    def forward(self, x: Tensor, feat_size: Size2) -> Tensor:
        """(B, H*W, dim) to (B, M, dim)."""
        maps = x.transpose(1, 2).reshape(x.shape[0], -1, *feat_size)
        maps = maps if self.pool is None else self.pool(maps)
        tokens = self.norm(self.conv(maps).flatten(2).transpose(1, 2))
        return tokens if self.act is None else self.act(tokens)  # type: ignore[no-any-return]

    def grid(self, feat_size: Size2) -> Size2:
        """The output size of the pooling, or the whole strides that fit."""
        if self.pool is not None:
            return self.pool.output_size, self.pool.output_size
        height, width = self.conv.kernel_size
        return feat_size[0] // height, feat_size[1] // width

    def macs(self, feat_size: Size2) -> int:
        """Those of the convolution."""
        return math.prod(self.grid(feat_size)) * self.conv.weight.numel()


class RowReduction(Reduction):
    """The mean of so many tokens that follow each other, row by row, and a norm.

    Args:
        count: How many.
        norm: Of (B, dim, M).
    """

    def __init__(self, count: int, norm: nn.Module) -> None:
        super().__init__()
        self.count = count
        self.norm = norm

    def forward(self, x: Tensor, feat_size: Size2) -> Tensor:
        """(B, N, dim) to (B, N // count, dim)."""
        means = F.avg_pool1d(x.transpose(1, 2), self.count)
        return self.norm(means).transpose(1, 2)  # type: ignore[no-any-return]

    def grid(self, feat_size: Size2) -> Size2:
        """One row."""
        return 1, math.prod(feat_size) // self.count

    def macs(self, feat_size: Size2) -> int:
        """None."""
        return 0


class LocalMixer(PlacedMixer):
    """A mixer of windows, called as Twins' blocks call their attention."""

    def forward(self, x: Tensor, size: Size2) -> Tensor:
        """(B, H*W, dim) to the same; the map is padded to whole windows with zeros, as the host does."""
        (height, width), (rows, cols) = size, self.mixer.feat_size
        batch, _, dim = x.shape
        maps = F.pad(x.reshape(batch, height, width, dim), (0, 0, 0, -width % cols, 0, -height % rows))
        down, across = maps.shape[1] // rows, maps.shape[2] // cols
        windows = maps.reshape(batch, down, rows, across, cols, dim).transpose(2, 3).reshape(-1, rows * cols, dim)
        out = self.mixer(windows).reshape(batch, down, across, rows, cols, dim)
        merged = out.transpose(2, 3).reshape(maps.shape)
        return merged[:, :height, :width].flatten(1, 2)


def _read(attn: Any, place: Place) -> Site:
    separate = hasattr(attn, "k")
    parts = [attn.q, attn.k, attn.v] if separate else [attn.q, attn.kv]
    reduction: Reduction | None = None
    if attn.sr is not None:
        if isinstance(attn.sr, nn.Conv2d):
            reduction = ConvReduction(attn.sr, attn.norm, getattr(attn, "pool", None), getattr(attn, "act", None))
        else:
            reduction = RowReduction(attn.N_ratio, attn.norm)
    return Site.of(
        attn,
        qkv_weight=torch.cat([part.weight for part in parts]),
        qkv_bias=None if attn.q.bias is None else torch.cat([part.bias for part in parts]),
        reduction=reduction,
        **place.tokens,
    )


def _read_local(attn: Any, place: Place) -> Site:
    return Site.of(attn, **biased(LocalMixer, None), **place.tokens)


def pvt_places(model: PyramidVisionTransformerV2) -> dict[str, Place]:
    """The blocks of every stage."""
    return {
        f"stages.{index}.blocks.{number}.attn": Place(module=block.attn, feat_size=map_grid(model, info["reduction"]))
        for index, (stage, info) in enumerate(zip(model.stages, model.feature_info, strict=True))
        for number, block in enumerate(stage.blocks)
    }


def twins_places(model: Twins) -> dict[str, Place]:
    """The blocks of every stage, local and global."""
    places = {}
    for index, (blocks, info) in enumerate(zip(model.blocks, model.feature_info, strict=True)):
        height, width = map_grid(model, info["reduction"])
        for number, block in enumerate(blocks):
            attn, grid, windows = block.attn, (height, width), 1
            if isinstance(attn, LocallyGroupedAttn | LocalMixer):
                size = attn.ws if isinstance(attn, LocallyGroupedAttn) else attn.mixer.feat_size[0]
                grid, windows = (size, size), -(-height // size) * -(-width // size)
            places[f"blocks.{index}.{number}.attn"] = Place(module=attn, feat_size=grid, windows=windows)
    return places


def nextvit_places(model: NextViT) -> dict[str, Place]:
    """The transformer block at the end of every stage; the others attend by convolution."""
    places = {}
    for index, (stage, info) in enumerate(zip(model.stages, model.feature_info, strict=True)):
        for name, block in stage.named_modules(prefix=f"stages.{index}"):
            if isinstance(block, NextTransformerBlock):
                grid = map_grid(model, info["reduction"])
                places[f"{name}.e_mhsa"] = Place(module=block.e_mhsa, feat_size=grid)
    return places


register_placed_rule(PyramidVisionTransformerV2, pvt_places, {PvtAttention: _read}, MapHost)
register_placed_rule(Twins, twins_places, {GlobalSubSampleAttn: _read, LocallyGroupedAttn: _read_local}, MapHost)
register_placed_rule(NextViT, nextvit_places, {EfficientAttention: _read}, MapHost)
