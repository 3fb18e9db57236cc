"""The vision towers of transformers: where their attention stands, and on which grid."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._typing import Size2
from ..errors import UnsupportedHostError
from ..layers import Reduction, TokenMixer
from .host import Site, attention_classes, converted_class
from .hugging_face_modules import (
    JoinedStandIn,
    MapStandIn,
    RotaryStandIn,
    StandIn,
    SwinStandIn,
    VariableGridStandIn,
    WindowStandIn,
    pair,
    pass_grid,
    pass_grids,
    windows_per_side,
)
from .pyramids import ConvReduction


@dataclass(frozen=True, kw_only=True)
class Place:
    """The tokens that reach an attention module.

    Args:
        feat_size: Their grid (H, W).
        num_prefix_tokens: Tokens before it.
        windows: How often the module runs per image.
        stand_in: What takes its place.
        reduction: What the host makes of its tokens before it projects them to keys and values, if anything.
    """

    feat_size: Size2
    num_prefix_tokens: int = 0
    windows: int = 1
    stand_in: type[StandIn] = StandIn
    reduction: Reduction | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """Vision towers of one kind.

    Args:
        towers: Names of the classes that take images.
        place: Reads the tokens of an attention module off the tower and the layer that holds it.
        pass_grid: Hook before the tower's forward that adds the grid to its arguments, where mixers need it.
        needs_map: Whether the host adds a bias to the logits.
        rotate_half: How a rotary position embedding pairs channels, where there is one; see ``Site``.
    """

    towers: tuple[str, ...]
    place: Callable[[Any, Any], Place]
    pass_grid: Callable[..., Any] | None = pass_grid
    needs_map: bool = False
    rotate_half: bool | None = None


def _whole(prefix: int, registers: bool = False, stand_in: type[StandIn] = StandIn) -> Callable[[Any, Any], Place]:
    """All tokens of an image, behind so many others, and behind registers, of which the config tells the number."""

    def place(tower: Any, layer: Any) -> Place:
        count = prefix + (tower.config.num_register_tokens if registers else 0)
        return Place(feat_size=_grid(tower), num_prefix_tokens=count, stand_in=stand_in)

    return place


def _pixio_place(tower: Any, layer: Any) -> Place:
    return Place(feat_size=_grid(tower), num_prefix_tokens=tower.config.n_cls_tokens)


def _swin_place(tower: Any, layer: Any) -> Place:
    window: Size2 = layer.attention.relative_position_bias.window_size
    rows, columns = (-(-extent // side) for extent, side in zip(layer.input_resolution, window, strict=True))
    return Place(feat_size=window, windows=rows * columns, stand_in=SwinStandIn)


def _segformer_place(tower: Any, layer: Any) -> Place:
    grid = pair(tower.config.image_size)
    for stage in tower.stages:
        conv = stage.patch_embeddings.proj
        height, width = (
            (extent + 2 * padding - kernel) // stride + 1
            for extent, padding, kernel, stride in zip(grid, conv.padding, conv.kernel_size, conv.stride, strict=True)
        )
        grid = (height, width)
        if any(block is layer for block in stage.blocks):
            break
    reduce = getattr(layer.attention, "sequence_reduction", None)
    reduction = None if reduce is None else ConvReduction(reduce.sequence_reduction, reduce.layer_norm)
    return Place(feat_size=grid, stand_in=MapStandIn, reduction=reduction)


def _windowed_place(prefix: int, in_windows: Callable[[Any], bool]) -> Callable[[Any, Any], Place]:
    """Tokens that are kept in windows, behind so many others in each; some layers join all windows of an image."""

    def place(tower: Any, layer: Any) -> Place:
        height, width = _grid(tower)
        side = windows_per_side(tower.config)
        if in_windows(layer):
            grid = (height // side, width // side)
            return Place(feat_size=grid, num_prefix_tokens=prefix, windows=side**2, stand_in=WindowStandIn)
        return Place(feat_size=(height, width), num_prefix_tokens=prefix * side**2, stand_in=JoinedStandIn)

    return place


FAMILIES: dict[str, Family] = {
    "ViTAttention": Family(towers=("ViTModel",), place=_whole(1)),
    "ViTMSNAttention": Family(towers=("ViTMSNModel",), place=_whole(1)),
    "DeiTAttention": Family(towers=("DeiTModel",), place=_whole(2)),
    "Dinov2Attention": Family(towers=("Dinov2Model", "Dinov2Backbone"), place=_whole(1)),
    "Dinov2WithRegistersAttention": Family(
        towers=("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"), place=_whole(1, registers=True)
    ),
    "DINOv3ViTAttention": Family(
        towers=("DINOv3ViTModel", "DINOv3ViTBackbone"),
        place=_whole(1, registers=True, stand_in=RotaryStandIn),
        rotate_half=True,
    ),
    "IJepaAttention": Family(towers=("IJepaModel",), place=_whole(0)),
    "SiglipAttention": Family(towers=("SiglipVisionModel",), place=_whole(0)),
    "Siglip2Attention": Family(
        towers=("Siglip2VisionModel",), place=_whole(0, stand_in=VariableGridStandIn), pass_grid=pass_grids
    ),
    "CLIPAttention": Family(towers=("CLIPVisionModel",), place=_whole(1)),
    "AltCLIPAttention": Family(towers=("AltCLIPVisionModel",), place=_whole(1)),
    "ChineseCLIPVisionAttention": Family(towers=("ChineseCLIPVisionModel",), place=_whole(1)),
    "CLIPSegAttention": Family(towers=("CLIPSegVisionModel",), place=_whole(1)),
    "MetaClip2Attention": Family(towers=("MetaClip2VisionModel",), place=_whole(1)),
    "OwlViTAttention": Family(towers=("OwlViTVisionTransformer",), place=_whole(1)),
    "Owlv2Attention": Family(towers=("Owlv2VisionTransformer",), place=_whole(1)),
    "Aimv2Attention": Family(towers=("Aimv2VisionModel",), place=_whole(0)),
    "Tipsv2VisionAttention": Family(
        towers=("Tipsv2VisionModel", "Tipsv2VisionBackbone"), place=_whole(1, registers=True)
    ),
    "PixioAttention": Family(towers=("PixioModel", "PixioBackbone"), place=_pixio_place),
    "BeitAttention": Family(towers=("BeitModel",), place=_whole(1), needs_map=True),
    "SwinAttention": Family(towers=("SwinModel",), place=_swin_place, pass_grid=None, needs_map=True),
    "SegformerAttention": Family(towers=("SegformerModel",), place=_segformer_place, pass_grid=None),
    "RfDetrDinov2Attention": Family(
        towers=("RfDetrDinov2Backbone",), place=_windowed_place(1, lambda layer: not layer.global_attention)
    ),
    "LwDetrViTAttention": Family(
        towers=("LwDetrViTBackbone",), place=_windowed_place(0, lambda layer: bool(layer.window))
    ),
}
"""By the name of the attention class, so that no model is imported before it is met."""


def towers(model: nn.Module) -> Iterator[tuple[str, Any, Family]]:
    """The vision towers in a model, by module name."""
    by_class = {tower: family for family in FAMILIES.values() for tower in family.towers}
    for name, module in model.named_modules():
        family = by_class.get(_kind(module))
        if family is not None:
            yield name, module, family


def hugging_face_sites(model: Any) -> dict[str, Site]:
    """The self-attention of every vision tower in a model.

    Raises:
        UnsupportedHostError: There is none.
    """
    sites: dict[str, Site] = {}
    for tower_name, tower, family in towers(model):
        for layer_name, layer in tower.named_modules(prefix=tower_name):
            for name, module in layer.named_children():
                if FAMILIES.get(_kind(module)) is family:
                    full_name = f"{layer_name}.{name}".removeprefix(".")
                    sites[full_name] = _site(module, layer, tower, family)
    if sites:
        return sites
    found = attention_classes(model)
    known = sorted(tower for family in FAMILIES.values() for tower in family.towers)
    raise UnsupportedHostError(
        f"{type(model).__name__} has no vision tower this can convert (attention classes in it: "
        f"{', '.join(found) if found else 'none'}); supported: whatever contains one of {', '.join(known)}"
    )


def _site(module: Any, layer: Any, tower: Any, family: Family) -> Site:
    place = family.place(tower, layer)
    fields: dict[str, Any] = {
        "windows": place.windows,
        "needs_map": family.needs_map,
        "rotate_half": family.rotate_half,
        "wrap": partial(_stand_in, place.stand_in, module),
    }
    if isinstance(module, StandIn):
        return Site.of_mixer(module.mixer, **fields)
    projections = [module.q_proj, module.k_proj, module.v_proj]
    scale = _first(module, "scaling", "scale")
    return Site.of(
        module,
        feat_size=place.feat_size,
        num_prefix_tokens=place.num_prefix_tokens,
        num_heads=_first(module, "num_attention_heads", "num_heads"),
        qkv_weight=torch.cat([projection.weight for projection in projections]),
        qkv_bias=_packed_bias(projections),
        proj=_first(module, "o_proj", "out_proj"),
        attn_drop=_first(module, "attention_dropout", "dropout"),
        mixer_args={} if scale == module.head_dim**-0.5 else {"scale": scale},
        init_weights=tower._init_weights,
        reduction=place.reduction,
        **fields,
    )


def _stand_in(kind: type[StandIn], module: nn.Module, mixer: TokenMixer) -> nn.Module:
    host = type(module).__bases__[1] if isinstance(module, StandIn) else type(module)
    return cast(Any, converted_class(kind, host))(mixer, module)  # type: ignore[no-any-return]


def _kind(module: nn.Module) -> str:
    """The name of the nearest class that is transformers' own."""
    names = (cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("transformers."))
    return next(names, "")


def _first(module: nn.Module, *names: str) -> Any:
    return next(getattr(module, name) for name in names if hasattr(module, name))


def _packed_bias(projections: list[nn.Linear]) -> Tensor | None:
    """The bias of three projections as one, zero where there is none; None where none has one."""
    if all(projection.bias is None for projection in projections):
        return None
    return torch.cat([p.weight.new_zeros(p.out_features) if p.bias is None else p.bias for p in projections])


def _grid(tower: Any) -> Size2:
    """The grid of patches a tower is built for."""
    if not hasattr(tower.config, "image_size"):  # as many patches as a square of them
        extent = int(tower.config.num_patches**0.5)
        return extent, extent
    (height, width), (patch_height, patch_width) = pair(tower.config.image_size), pair(tower.config.patch_size)
    return height // patch_height, width // patch_width
