"""The tokens that reach the attention modules of transformers' vision towers, read off the towers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .._typing import Size2
from ..errors import UnsupportedHostError
from .hiera import GridMaxPool, unrolled_windows
from .hugging_face_grids import pair
from .hugging_face_modules import (
    AddedStandIn,
    JoinedStandIn,
    MapStandIn,
    StandIn,
    SuffixStandIn,
    SwinStandIn,
    SwinV2StandIn,
    UnrolledStandIn,
    WindowStandIn,
    windows_per_side,
)
from .pyramids import ConvReduction
from .windows import CosineKey, CosineQuery

DETR_IMAGE_SIZE = 1024
RT_DETR_IMAGE_SIZE = 640
SEGFORMER_IMAGE_SIZE = 224
"""Where the config does not tell the size of images."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """The tokens that reach an attention module.

    Args:
        feat_size: Their grid (H, W).
        num_prefix_tokens: Tokens before it.
        windows: How often the module runs per image.
        stand_in: What takes its place.
        stand_in_args: What it is made of beside mixer and module.
    """

    feat_size: Size2
    num_prefix_tokens: int = 0
    windows: int = 1
    stand_in: type[StandIn] = StandIn
    stand_in_args: Mapping[str, Any] = field(default_factory=dict)


ReadPlace = Callable[[Any, Any], Place]
"""Reads the place of an attention module off its tower and the module that holds it."""


def whole(prefix: int, registers: bool = False, stand_in: type[StandIn] = StandIn) -> ReadPlace:
    """All tokens of an image, behind so many others, and behind registers, of which the config tells the number."""

    def place(tower: Any, layer: Any) -> Place:
        count = prefix + (tower.config.num_register_tokens if registers else 0)
        return Place(feat_size=image_grid(tower), num_prefix_tokens=count, stand_in=stand_in)

    return place


def pixio_place(tower: Any, layer: Any) -> Place:
    """All tokens of an image, behind as many class tokens as the config tells."""
    return Place(feat_size=image_grid(tower), num_prefix_tokens=tower.config.n_cls_tokens)


def yolos_place(tower: Any, layer: Any) -> Place:
    """All tokens of an image, between a class token and those that detect."""
    count = 1 + tower.config.num_detection_tokens
    return Place(feat_size=image_grid(tower), num_prefix_tokens=count, stand_in=SuffixStandIn)


def swin_place(tower: Any, layer: Any) -> Place:
    """The tokens of a window."""
    window: Size2 = layer.attention.relative_position_bias.window_size
    rows, columns = (-(-extent // side) for extent, side in zip(layer.input_resolution, window, strict=True))
    return Place(feat_size=window, windows=rows * columns, stand_in=SwinStandIn)


def swin_v2_place(tower: Any, holder: Any) -> Place:
    """The same; the module that holds the attention is not the block."""
    block = next(module for module in tower.modules() if getattr(module, "attention", None) is holder)
    window = (block.window_size, block.window_size)
    rows, columns = (-(-extent // block.window_size) for extent in block.input_resolution)
    return Place(feat_size=window, windows=rows * columns, stand_in=SwinV2StandIn)


def swin_v2_parts(module: Any, place: Place) -> dict[str, Any]:
    """Queries and keys are compared by their angle."""
    return {"q_norm": CosineQuery(module.logit_scale), "k_norm": CosineKey()}


def pvt_v2_place(tower: Any, block: Any) -> Place:
    """The map of a stage."""
    stages = tower.encoder.layers
    index = next(i for i, stage in enumerate(stages) if any(own is block for own in stage.blocks))
    convs = [stage.patch_embedding.proj for stage in stages]
    return Place(feat_size=convolved(pair(tower.config.image_size), convs[: index + 1]), stand_in=MapStandIn)


def pvt_v2_parts(module: Any, place: Place) -> dict[str, Any]:
    """What is made of the map for the keys, if anything."""
    if not hasattr(module, "spatial_reduction"):
        return {}
    pool, act = getattr(module, "pool", None), getattr(module, "act", None)
    return {"reduction": ConvReduction(module.spatial_reduction, module.layer_norm, pool, act)}


def segformer_place(tower: Any, layer: Any) -> Place:
    """The map of a stage."""
    convs = [stage.patch_embeddings.proj for stage in tower.stages]
    index = next(i for i, stage in enumerate(tower.stages) if any(block is layer for block in stage.blocks))
    size = getattr(tower.config, "image_size", SEGFORMER_IMAGE_SIZE)
    return Place(feat_size=convolved(pair(size), convs[: index + 1]), stand_in=MapStandIn)


def segformer_parts(module: Any, place: Place) -> dict[str, Any]:
    """What is made of the map for the keys, if anything."""
    reduce = getattr(module, "sequence_reduction", None)
    return {} if reduce is None else {"reduction": ConvReduction(reduce.sequence_reduction, reduce.layer_norm)}


def windowed(prefix: int, in_windows: Callable[[Any], bool]) -> ReadPlace:
    """Tokens that are kept in windows, behind so many others in each; some layers join all windows of an image."""

    def place(tower: Any, layer: Any) -> Place:
        height, width = image_grid(tower)
        side = windows_per_side(tower.config)
        if in_windows(layer):
            grid = (height // side, width // side)
            return Place(feat_size=grid, num_prefix_tokens=prefix, windows=side**2, stand_in=WindowStandIn)
        return Place(feat_size=(height, width), num_prefix_tokens=prefix * side**2, stand_in=JoinedStandIn)

    return place


def detr_place(stand_in: type[StandIn]) -> ReadPlace:
    """The last map of a body, whose tokens see a position embedding in queries and keys."""

    def place(tower: Any, layer: Any) -> Place:
        config = tower.config
        stride = 16 if getattr(config, "dilation", False) else 32
        return _added(getattr(config, "image_size", DETR_IMAGE_SIZE), stride, stand_in)

    return place


def aifi_place(tower: Any, layer: Any) -> Place:
    """One of several maps of a body, likewise."""
    config = tower.config
    index = next(i for i, aifi in enumerate(tower.aifi) if any(own is layer for own in aifi.layers))
    size = getattr(config, "image_size", config.eval_size or RT_DETR_IMAGE_SIZE)
    return _added(size, config.feat_strides[config.encode_proj_layers[index]])


def _added(image_size: Any, stride: int, stand_in: type[StandIn] = AddedStandIn) -> Place:
    height, width = pair(image_size)
    grid = (-(-height // stride), -(-width // stride))
    return Place(feat_size=grid, stand_in=stand_in)


def hiera_place(tower: Any, layer: Any) -> Place:
    """Mask units or the whole map, in an order of Hiera's own.

    Raises:
        UnsupportedHostError: Strides between stages are others than two.
    """
    config = tower.config
    if tuple(config.query_stride) != (2, 2):
        raise UnsupportedHostError(f"this Hiera has query_stride={config.query_stride}; supported: (2, 2)")
    layers = [own for stage in tower.encoder.stages for own in stage.layers]
    before = layers[: next(i for i, own in enumerate(layers) if own is layer)]
    index, stage = next((i, s) for i, s in enumerate(tower.encoder.stages) if any(own is layer for own in s.layers))
    in_units = config.masked_unit_attention  # of a stage, and of the first layer in the next one, which pools
    sizes = zip(pair(config.image_size), pair(config.patch_stride), pair(config.masked_unit_size), strict=True)
    rows, columns = (extent // stride // unit for extent, stride, unit in sizes)
    grid, parts = unrolled_windows(
        (rows, columns),
        in_units[index] or (stage.layers[0] is layer and in_units[max(index - 1, 0)]),
        len(config.depths) - 1 - sum(own.query_stride > 1 for own in before),
        layer.query_stride > 1,
        layer.layernorm_before.weight.device,
    )
    return Place(feat_size=grid, windows=parts["num_windows"], stand_in=UnrolledStandIn, stand_in_args=parts)


def hiera_parts(module: Any, place: Place) -> dict[str, Any]:
    """What makes one query of several tokens, if anything."""
    if module.query_stride == 1:
        return {}
    return {"q_norm": GridMaxPool(place.feat_size), "tokens_per_query": module.query_stride}


def convolved(grid: Size2, convs: list[nn.Conv2d]) -> Size2:
    """The grid of what convolutions make of a map, one after another."""
    for conv in convs:
        assert not isinstance(conv.padding, str)
        height, width = (
            (extent + 2 * padding - kernel) // stride + 1
            for extent, padding, kernel, stride in zip(grid, conv.padding, conv.kernel_size, conv.stride, strict=True)
        )
        grid = (height, width)
    return grid


def image_grid(tower: Any) -> Size2:
    """The grid of patches a tower is built for."""
    if not hasattr(tower.config, "image_size"):  # as many patches as a square of them
        extent = int(tower.config.num_patches**0.5)
        return extent, extent
    (height, width), (patch_height, patch_width) = pair(tower.config.image_size), pair(tower.config.patch_size)
    return height // patch_height, width // patch_width
