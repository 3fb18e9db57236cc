"""The small vision transformer of the paper, for 32 x 32 images: ``{,ska_,cska_,fcska_}lsa_vit_small_patch4_32``.

Shifted patch tokenisation and locality self-attention (learned temperature, masked diagonal) are those of Lee et
al., Vision Transformer for Small-Size Datasets, arXiv 2112.13492.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .._typing import Key, OffGrid, Size2
from ..convert import MixerSlot, convert
from ..errors import StaticKeyError
from .reference import accept_reference_layout
from .registration import CIFAR_VIT_CFG, VIT_FEATURES, register, with_key_args

SHIFTS = ((1, -1, 0, 0), (-1, 1, 0, 0), (0, 0, 1, -1), (0, 0, -1, 1))
"""Padding (left, right, top, bottom) of the four shifted copies of an image, in pixels."""


class ShiftedPatchEmbed(PatchEmbed):  # type: ignore[misc]
    """Patches of the image and of its four copies shifted by one pixel, normalised, then projected.

    Attributes: ``norm``, over the p*p*5*in_chans values of a patch, and ``proj`` (Linear). Values are in the
    order row, column, copy, channel. Arguments are those of timm's ``PatchEmbed``.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int = 512,
        *,
        bias: bool = True,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        output_fmt: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            img_size,
            patch_size,
            in_chans,
            embed_dim,
            bias=bias,
            strict_img_size=strict_img_size,
            dynamic_img_pad=dynamic_img_pad,
            output_fmt=output_fmt,
            device=device,
            dtype=dtype,
        )
        width = (1 + len(SHIFTS)) * in_chans * self.patch_size[0] * self.patch_size[1]
        self.in_chans = in_chans
        self.norm = nn.LayerNorm(width, device=device, dtype=dtype)
        self.proj = nn.Linear(width, embed_dim, bias=bias, device=device, dtype=dtype)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Change the input size.

        Raises:
            StaticKeyError: Another patch size is asked for.
        """
        if patch_size is not None and tuple(patch_size) != tuple(self.patch_size):
            raise StaticKeyError(f"patch_size={patch_size}: patches here are normalised, they cannot be resampled")
        super().set_input_size(img_size=img_size)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to tokens (B, N, embed_dim), or a map (B, h, w, embed_dim) for a dynamic size."""
        height, width = x.shape[2], x.shape[3]
        rows, cols = self.patch_size
        if self.strict_img_size:
            torch._assert(height == self.img_size[0], f"Input height is not the model's ({self.img_size[0]}).")
            torch._assert(width == self.img_size[1], f"Input width is not the model's ({self.img_size[1]}).")
        if self.dynamic_img_pad:
            x = F.pad(x, (0, (cols - width % cols) % cols, 0, (rows - height % rows) % rows))
        else:
            torch._assert(height % rows == 0, f"Input height is no multiple of the patch size ({rows}).")
            torch._assert(width % cols == 0, f"Input width is no multiple of the patch size ({cols}).")
        x = torch.cat([x, *(F.pad(x, shift) for shift in SHIFTS)], dim=1)
        x = x.reshape(x.shape[0], x.shape[1], x.shape[2] // rows, rows, x.shape[3] // cols, cols)
        x = x.permute(0, 2, 4, 3, 5, 1).flatten(3)  # rows, columns, copies and channels of a patch
        x = self.proj(self.norm(x))
        return x.flatten(1, 2) if self.flatten else x


def lsa_vit(
    *,
    mixer: str,
    num_heads: int = 8,
    head_dim: int = 64,
    key: Key | None = None,
    key_size: Size2 | None = None,
    off_grid: OffGrid | None = None,
    mixer_args: Mapping[str, Any] | None = None,
    **host_args: Any,
) -> VisionTransformer:
    """A small vision transformer with shifted patches and a locality-aware mixer in all its blocks.

    Args:
        mixer: A name in ``MIXERS`` that takes ``learned_temperature`` and ``mask_diagonal``.
        num_heads: Number of heads; 10 gives SKA the parameters of self-attention, as published.
        head_dim: Width of one head, whatever ``embed_dim``.
        key: Kind of the static key.
        key_size: Grid (h', w') of the static key; with the diagonal masked it saves no time.
        off_grid: What the static key does on another grid than the built one.
        mixer_args: Further constructor arguments of the mixer.
        host_args: Constructor arguments of timm's ``VisionTransformer``.
    """
    own = with_key_args([mixer], {mixer: mixer_args}, key=key, key_size=key_size, off_grid=off_grid)[mixer]
    model = VisionTransformer(
        attn_layer=MixerSlot, embed_layer=ShiftedPatchEmbed, num_heads=1, weight_init="skip", **host_args
    )
    with torch.no_grad():
        for tensor in (model.pos_embed, model.cls_token, model.reg_token):
            if tensor is not None:
                nn.init.normal_(tensor)
    locality = {"num_heads": num_heads, "head_dim": head_dim, "learned_temperature": True, "mask_diagonal": True}
    convert(model, mixer, mixer_args=locality | own)
    model.state_dict_filter = accept_reference_layout
    return model


NAMES = register(
    __name__,
    {
        f"{prefix}lsa_vit_small_patch4_32": (
            partial(lsa_vit, mixer=mixer),
            {
                "img_size": 32,
                "patch_size": 4,
                "embed_dim": 512,
                "depth": 6,
                "mlp_ratio": 1.0,
                "qkv_bias": False,
                "norm_layer": nn.LayerNorm,  # eps 1e-5, as the reference's
                "pos_drop_rate": 0.1,
                "proj_drop_rate": 0.1,
                "attn_drop_rate": 0.1,
            },
        )
        for prefix, mixer in {"": "mhsa", "ska_": "ska", "cska_": "cska", "fcska_": "fcska"}.items()
    },
    cfg=CIFAR_VIT_CFG | {"first_conv": ()},  # no convolution: checkpoint_filter_fn adapts in_chans
    feature_cfg=VIT_FEATURES,
    host=lambda name: "vit_small_patch16_224",
)
