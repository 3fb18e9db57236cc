"""Rules for hosts that attend on part of a map: LowFormer, CPUBone (strides), SHViT (channels), SAM 2, CSATv2."""

from typing import Any

import torch
from timm.layers import Attention
from timm.models.cpubone import ConvAttention as CpuBoneAttention
from timm.models.cpubone import CPUBone
from timm.models.csatv2 import CSATv2
from timm.models.csatv2 import TransformerBlock as CsatBlock
from timm.models.hieradet_sam2 import HieraDet, MultiScaleAttention
from timm.models.lowformer import ConvAttention as LowFormerAttention
from timm.models.lowformer import LowFormer
from timm.models.shvit import SHSA, SHViT
from torch import Tensor, nn
from torch.nn import functional as F

from .._typing import Size2
from ..layers import TokenMixer
from .hiera import GridMaxPool
from .host import Site
from .places import MapHost, Place, PlacedMixer, biased, map_grid, parts_first, register_placed_rule


class StridedMixer(PlacedMixer):
    """A mixer of a map made smaller, and bigger again.

    Args:
        mixer: The mixer.
        rel_pos: There is none.
        down: Makes the map smaller.
        up: Makes what comes out bigger.
        multiple: Sides are padded with zeros to multiples of it.
    """

    def __init__(self, mixer: TokenMixer, rel_pos: None, down: Any, up: nn.Module, multiple: int) -> None:
        super().__init__(mixer, rel_pos)
        self.down = down
        self.up = up
        self.multiple = multiple

    def parts(self) -> dict[str, Any]:
        """All but the mixer."""
        return {name: getattr(self, name) for name in ("rel_pos", "down", "up", "multiple")}

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        height, width = x.shape[-2:]
        out = self.up(self.mixer(self.down(F.pad(x, (0, -width % self.multiple, 0, -height % self.multiple)))))
        return out[..., :height, :width]  # type: ignore[no-any-return]


class ChannelMixer(PlacedMixer):
    """A mixer of the first channels of a map, beside the others, and what follows on all.

    Args:
        mixer: The mixer.
        rel_pos: There is none.
        norm: Of the first channels.
        proj: Of all channels, afterwards.
    """

    def __init__(self, mixer: TokenMixer, rel_pos: None, norm: nn.Module, proj: nn.Module) -> None:
        super().__init__(mixer, rel_pos)
        self.norm = norm
        self.proj = proj

    def parts(self) -> dict[str, Any]:
        """All but the mixer."""
        return {name: getattr(self, name) for name in ("rel_pos", "norm", "proj")}

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        first, rest = x.tensor_split([self.mixer.dim], dim=1)
        return self.proj(torch.cat([self.mixer(self.norm(first)), rest], dim=1))  # type: ignore[no-any-return]


class PooledQueryMixer(PlacedMixer):
    """A mixer of a map with channels last, whose queries are pooled 2 x 2."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) to (B, H / 2, W / 2, out_dim)."""
        batch, height, width, _ = x.shape
        out = self.mixer(x.flatten(1, 2))
        return out.reshape(batch, height // 2, width // 2, out.shape[-1])


def _read_strided(attn: Any, place: Place) -> Site:
    fused = isinstance(attn.o_proj, nn.Identity)
    return Site.of(
        attn,
        input_fmt="NCHW",
        qkv_weight=parts_first(attn.pwise.weight, attn.num_heads, *[attn.head_dim] * 3),
        proj=None if fused else attn.o_proj,
        with_proj=not fused,
        **biased(StridedMixer, None, down=attn.conv_proj, up=attn.upsampling, multiple=_multiple(attn)),
        **place.tokens,
    )


def _read_shvit(attn: Any, place: Place) -> Site:
    return Site.of(
        attn,
        input_fmt="NCHW",
        num_heads=1,
        value_dim=attn.pdim,
        qkv_weight=attn.qkv.c.weight,
        qkv_norm=attn.qkv.bn,
        with_proj=False,
        **biased(ChannelMixer, None, norm=attn.pre_norm, proj=attn.proj),
        **place.tokens,
    )


def _read_sam2(attn: Any, place: Place) -> Site:
    if attn.q_pool is None:
        return Site.of(attn, input_fmt="NHWC", **place.tokens)
    pool = GridMaxPool(place.feat_size)
    return Site.of(attn, q_norm=pool, tokens_per_query=4, **biased(PooledQueryMixer, None), **place.tokens)


def _read_plain(attn: Any, place: Place) -> Site:
    return Site.of(attn, q_norm=attn.q_norm, k_norm=attn.k_norm, out_norm=attn.norm, **place.tokens)


def strided_places(model: LowFormer | CPUBone) -> dict[str, Place]:
    """The blocks with attention, on maps made smaller by a stride."""
    places = {}
    for info in model.feature_info:
        height, width = map_grid(model, info["reduction"])
        for name, module in model.get_submodule(info["module"]).named_modules(prefix=info["module"]):
            if isinstance(module, CpuBoneAttention | LowFormerAttention | StridedMixer):
                places[name] = Place(module=module, feat_size=_made_smaller(module, (height, width)))
    return places


def _made_smaller(module: Any, size: Size2) -> Size2:
    """The grid of a map behind the strided convolution of an attention, or of the mixer in its place."""
    conv = module.down.conv if isinstance(module, StridedMixer) else module.conv_proj.conv
    if isinstance(conv, nn.Sequential):
        return size  # timm pads an even kernel of stride 1 so that the size stays
    multiple = module.multiple if isinstance(module, StridedMixer) else _multiple(module)
    height, width = (
        (extent + -extent % multiple + 2 * pad - kernel) // stride + 1
        for extent, pad, kernel, stride in zip(size, conv.padding, conv.kernel_size, conv.stride, strict=True)
    )
    return height, width


def _multiple(attn: Any) -> int:
    return attn.att_stride if getattr(attn, "small_kernels", False) else 1


def shvit_places(model: SHViT) -> dict[str, Place]:
    """The blocks with attention."""
    return {
        name: Place(module=module, feat_size=map_grid(model, info["reduction"]))
        for info in model.feature_info
        for name, module in model.get_submodule(info["module"]).named_modules(prefix=info["module"])
        if isinstance(module, SHSA | ChannelMixer)
    }


def csat_places(model: CSATv2) -> dict[str, Place]:
    """The transformer blocks, the first of a stage on the map it has halved."""
    return {
        f"{name}.attn": Place(module=block.attn, feat_size=map_grid(model, info["reduction"]))
        for info in model.feature_info
        for name, block in model.get_submodule(info["module"]).named_modules(prefix=info["module"])
        if isinstance(block, CsatBlock)
    }


def sam2_places(model: HieraDet) -> dict[str, Place]:
    """The blocks, in windows or on the whole map."""
    places, reduction = {}, 4
    for index, block in enumerate(model.blocks):
        height, width = map_grid(model, reduction)
        grid, windows = (height, width), 1
        if block.is_windowed:
            rows, cols = grid = block.window_size
            windows = -(-height // rows) * -(-width // cols)
        places[f"blocks.{index}.attn"] = Place(module=block.attn, feat_size=grid, windows=windows)
        reduction *= 1 if block.q_stride is None else 2
    return places


register_placed_rule(LowFormer, strided_places, {LowFormerAttention: _read_strided}, MapHost)
register_placed_rule(CPUBone, strided_places, {CpuBoneAttention: _read_strided}, MapHost)
register_placed_rule(SHViT, shvit_places, {SHSA: _read_shvit}, MapHost)
register_placed_rule(CSATv2, csat_places, {Attention: _read_plain}, MapHost)
register_placed_rule(HieraDet, sam2_places, {MultiScaleAttention: _read_sam2}, MapHost)
