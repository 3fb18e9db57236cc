"""The built-in small vision transformer, sized for runs of minutes on a CPU."""

import timm
import torch
from torch import nn

from .._checks import check_head_dim, check_positive, nearest_divisors
from ..errors import StaticKeyError

POS_EMBED_STD = 0.3


def small_vit_sizes(img_size: int) -> dict[str, int]:
    """The arguments of ``small_vit`` whose defaults follow the image size; a trained network keeps its own."""
    tiny = img_size <= 16
    return {"patch_size": max(img_size // (4 if tiny else 8), 1), "embed_dim": 64 if tiny else 96}


def small_vit(
    img_size: int,
    *,
    num_classes: int,
    in_chans: int = 3,
    patch_size: int | None = None,
    embed_dim: int | None = None,
    depth: int = 4,
    num_heads: int = 4,
    mlp_ratio: float = 2.0,
    drop_path_rate: float = 0.0,
) -> nn.Module:
    """A small ViT without class token, mean-pooled, whose defaults train well from scratch with mhsa.

    timm's 224-pixel defaults starve self-attention on small images: weights of std 0.02 leave narrow layers
    near zero, and so does a position embedding of std 0.02. Here weights are Xavier uniform and the position
    embedding has std ``POS_EMBED_STD``.

    Args:
        img_size: Side of the square input in pixels.
        num_classes: Classes of the head.
        in_chans: Channels of the input.
        patch_size: Side of a patch in pixels; default a quarter of images up to 16 pixels, else an eighth.
        embed_dim: Width; default 64 for images up to 16 pixels, else 96.
        depth: Number of blocks.
        num_heads: Number of heads.
        mlp_ratio: Hidden width of the perceptrons over ``embed_dim``.
        drop_path_rate: Stochastic depth rate of the last block.

    Returns:
        A timm ``VisionTransformer``.

    Raises:
        StaticKeyError: The patch size does not divide the image, or an argument is out of range.
    """
    sizes = small_vit_sizes(img_size)
    patch_size = sizes["patch_size"] if patch_size is None else patch_size
    embed_dim = sizes["embed_dim"] if embed_dim is None else embed_dim
    check_positive(img_size=img_size, patch_size=patch_size, depth=depth)
    check_head_dim(embed_dim, num_heads, None)
    if img_size % patch_size:
        raise StaticKeyError(
            f"patch_size={patch_size} does not divide img_size={img_size}; "
            f"use one of {nearest_divisors(img_size, patch_size)}, "
            f"or img_size={img_size - img_size % patch_size or patch_size}"
        )
    model = timm.models.VisionTransformer(
        img_size=img_size,
        patch_size=patch_size,
        in_chans=in_chans,
        num_classes=num_classes,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
        drop_path_rate=drop_path_rate,
        class_token=False,
        global_pool="avg",
        weight_init="jax",
    )
    with torch.no_grad():
        nn.init.trunc_normal_(model.pos_embed, std=POS_EMBED_STD)
    return model  # type: ignore[no-any-return]
