"""Vision transformers with static keys in every block.

``{ska,cska,fcska,ska_continuous}_vit_{tiny,small,base}_patch16_224``.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models.vision_transformer import VisionTransformer

from .._typing import Key, OffGrid, Size2
from ..convert import MixerSlot, convert
from ..errors import StaticKeyError
from .reference import accept_reference_layout
from .registration import CIFAR_VIT_CFG, VIT_FEATURES, register, with_key_args

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}


def static_key_vit(
    *,
    mixer: str,
    key: Key | None = None,
    key_size: Size2 | None = None,
    off_grid: OffGrid | None = None,
    mixer_args: Mapping[str, Any] | None = None,
    fix_init: bool = False,
    **host_args: Any,
) -> VisionTransformer:
    """A timm vision transformer with one mixer in all its blocks.

    Args:
        mixer: A name in ``MIXERS``.
        key: Kind of the static key.
        key_size: Grid (h', w') of the static key.
        off_grid: What the static key does on another grid than the built one.
        mixer_args: Further constructor arguments of the mixer.
        fix_init: As in timm: scale projections down with depth.
        host_args: Constructor arguments of timm's ``VisionTransformer``.
    """
    args = with_key_args([mixer], {mixer: mixer_args}, key=key, key_size=key_size, off_grid=off_grid)[mixer]
    model = VisionTransformer(attn_layer=MixerSlot, **host_args)
    convert(model, mixer, mixer_args=args)
    model.state_dict_filter = accept_reference_layout
    if fix_init:
        if not hasattr(model.blocks[0].attn, "proj"):
            raise StaticKeyError(f"fix_init=True scales output projections, mixer {mixer!r} has none")
        model.fix_init_weight()
    return model


NAMES = register(
    __name__,
    {
        f"{name}_vit_{size}_patch16_224": (
            partial(static_key_vit, mixer=name.removesuffix("_continuous")),
            {"patch_size": 16, **({"key": "continuous"} if "continuous" in name else {}), **sizes},
        )
        for name in ("ska", "cska", "fcska", "ska_continuous")
        for size, sizes in SIZES.items()
    },
    cfg=CIFAR_VIT_CFG
    | {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "crop_pct": 0.9,
        "mean": IMAGENET_INCEPTION_MEAN,
        "std": IMAGENET_INCEPTION_STD,
    },
    feature_cfg=VIT_FEATURES,
    host=lambda name: name[name.index("vit") :],
)
