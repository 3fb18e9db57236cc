"""The small vision transformer for runs of minutes on a CPU: ``small_vit``."""

from collections.abc import Mapping
from typing import Any

import torch
from timm.models._input import update_model_args
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from .._checks import check_head_dim, check_img_size, check_mapping, check_positive, nearest_divisors
from .._typing import Key, OffGrid, Size2
from ..convert import convert
from ..errors import StaticKeyError
from .registration import CIFAR_VIT_CFG, VIT_FEATURES, register, with_key_args

POS_EMBED_STD = 0.3


def small_transformer(
    *,
    mixer: str | None = None,
    key: Key | None = None,
    key_size: Size2 | None = None,
    off_grid: OffGrid | None = None,
    mixer_args: Mapping[str, Any] | None = None,
    img_size: int | tuple[int, int] = 32,
    patch_size: int | None = None,
    embed_dim: int | None = None,
    depth: int = 4,
    num_heads: int = 4,
    mlp_ratio: float = 2.0,
    **host_args: Any,
) -> VisionTransformer:
    """A small ViT without class token, mean-pooled, whose defaults train well from scratch with mhsa.

    timm's 224-pixel defaults starve self-attention on small images: weights of std 0.02 leave narrow layers
    near zero, and so does a position embedding of std 0.02. Here weights are Xavier uniform and the position
    embedding has std ``POS_EMBED_STD``.

    Args:
        mixer: A name in ``MIXERS``; None keeps timm's self-attention.
        key: Kind of the static key.
        key_size: Grid (h', w') of the static key.
        off_grid: What the static key does on another grid than the built one.
        mixer_args: Further constructor arguments of the mixer.
        img_size: Pixels, one side or (height, width).
        patch_size: Side of a patch in pixels; default a quarter of images up to 16 pixels, else an eighth.
        embed_dim: Width; default 64 for images up to 16 pixels, else 96.
        depth: Number of blocks.
        num_heads: Number of heads.
        mlp_ratio: Hidden width of the perceptrons over ``embed_dim``.
        host_args: Constructor arguments of timm's ``VisionTransformer``.

    Raises:
        StaticKeyError: The patch size does not divide the image, or an argument is out of range.
    """
    mixers = [] if mixer is None else [mixer]
    args = with_key_args(
        mixers, {} if mixer is None else {mixer: mixer_args}, key=key, key_size=key_size, off_grid=off_grid
    )
    size = check_img_size(img_size)
    side = min(size)
    if patch_size is None:
        patch_size = max(side // (4 if side <= 16 else 8), 1)
    if embed_dim is None:
        embed_dim = 64 if side <= 16 else 96
    check_positive(patch_size=patch_size, depth=depth)
    check_head_dim(embed_dim, num_heads, None)
    for extent in size:
        if extent % patch_size:
            raise StaticKeyError(
                f"patch_size={patch_size} does not divide img_size={img_size}; "
                f"use one of {nearest_divisors(extent, patch_size)}, "
                f"or img_size={extent - extent % patch_size or patch_size}"
            )
    defaults = {"class_token": False, "global_pool": "avg", "weight_init": "jax"}
    model = VisionTransformer(
        img_size=size,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
        **defaults | host_args,
    )
    if model.pos_embed is not None:
        with torch.no_grad():
            nn.init.trunc_normal_(model.pos_embed, std=POS_EMBED_STD)
    if mixer is not None:
        convert(model, mixer, mixer_args=args[mixer])
    elif check_mapping("mixer_args", mixer_args):
        raise StaticKeyError(f"mixer_args={mixer_args} without a mixer; name one of MIXERS, such as mixer='ska'")
    # a trained network keeps its own at every image size
    update_model_args(model, patch_size=patch_size, embed_dim=embed_dim)
    return model


NAMES = register(
    __name__,
    {"small_vit": (small_transformer, {})},
    cfg=CIFAR_VIT_CFG,
    feature_cfg=VIT_FEATURES,
)
