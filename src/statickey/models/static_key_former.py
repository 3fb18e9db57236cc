"""MetaFormers with any token mixer per stage.

``{skaformer,cskaformer,fcskaformer,skaformer_continuous}_{nano,s18,s36,m36,b36}``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models._input import update_model_input_size
from timm.models.metaformer import LayerNorm2dNoBias, LayerNormNoBias, MetaFormer

from .._checks import check_img_size, check_mapping
from .._typing import Key, OffGrid, Size2
from ..convert import MapSlot, TokenSlot, convert, stage_grids
from ..errors import StaticKeyError
from ..layers import MIXERS
from .reference import accept_reference_layout
from .registration import register, with_key_args

SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "nano": {"depths": (1, 1, 3, 1), "dims": (32, 64, 160, 256)},
    "s18": {"depths": (3, 3, 9, 3), "dims": (64, 128, 320, 512)},
    "s36": {"depths": (3, 12, 18, 3), "dims": (64, 128, 320, 512)},
    "m36": {"depths": (3, 12, 18, 3), "dims": (96, 192, 384, 576)},
    "b36": {"depths": (3, 12, 18, 3), "dims": (128, 256, 512, 768)},
}

REFERENCE_ARGS: dict[str, dict[str, Any]] = {
    "ska": {"head_dim": 32, "query_proj": False},
    "cska": {"head_dim": 16},
    "fcska": {"head_dim": 16},
}
"""Mixer arguments of the reference MetaFormers; head_dim is 32 where nothing is said."""


def static_key_former(
    *,
    mixers: Sequence[str],
    key: Key | None = None,
    key_size: Size2 | None = None,
    off_grid: OffGrid | None = None,
    mixer_args: Mapping[str, Mapping[str, Any]] | None = None,
    img_size: int | tuple[int, int] = 224,
    depths: Sequence[int],
    dims: Sequence[int],
    **host_args: Any,
) -> MetaFormer:
    """A timm MetaFormer with any token mixer in each stage.

    It runs on any input size; a stage with a static key resamples it, averages values over the cells of the grid it
    was made for (``off_grid="pool"``) or of its own (``key_size=(7, 7)``), or tiles the map (``off_grid="window"``).

    Args:
        mixers: One name in ``MIXERS`` per stage.
        key: Kind of the static keys.
        key_size: Grid (h', w') of the static keys.
        off_grid: What the static keys do on another grid than the built one.
        mixer_args: Further constructor arguments by mixer name, over ``REFERENCE_ARGS``.
        img_size: Pixels the keys are built for, one side or (height, width).
        depths: Blocks per stage.
        dims: Channels per stage.
        host_args: Constructor arguments of timm's ``MetaFormer``, and ``qkv_bias``, ``proj_bias``, ``attn_drop``
            for all mixers.

    Raises:
        UnknownNameError: No mixer of that name.
        StaticKeyError: Not one mixer, depth and width per stage, or arguments for a mixer that is not used.
        FeatSizeError: The image is too small for a stage.
    """
    if isinstance(mixers, str) or not len(mixers) == len(depths) == len(dims):
        raise StaticKeyError(
            f"mixers={mixers!r} must hold one name per stage, as many as depths={depths!r} and dims={dims!r}; "
            'for example mixers=("sepconv", "ska", "mhsa", "mhsa")'
        )
    args = check_mapping("mixer_args", mixer_args)
    if not args.keys() <= set(mixers):
        raise StaticKeyError(
            f"mixer_args={args!r} must map names of {tuple(mixers)} to their arguments, "
            'such as {"cska": {"kernel_size": 5}}'
        )
    merged = with_key_args(mixers, args, key=key, key_size=key_size, off_grid=off_grid)
    on_maps = [getattr(MIXERS[mixer], "layout", "NLC") == "NCHW" for mixer in mixers]
    model = MetaFormer(
        depths=tuple(depths),
        dims=tuple(dims),
        token_mixers=[MapSlot if maps else TokenSlot for maps in on_maps],
        norm_layers=[LayerNorm2dNoBias if maps else LayerNormNoBias for maps in on_maps],
        **host_args,
    )
    size = check_img_size(img_size)
    stage_grids(model, size)
    update_model_input_size(model, size)
    for index, mixer in enumerate(mixers):
        own = merged[mixer]
        settings = REFERENCE_ARGS.get(mixer, {}) | own
        if "num_heads" in own and "head_dim" not in own:
            settings = {name: value for name, value in settings.items() if name != "head_dim"}
        convert(model, mixer, layers=f"stages.{index}", mixer_args=settings)
    model.state_dict_filter = accept_reference_layout
    return model


NAMES = register(
    __name__,
    {
        f"{mixer}former{kind}_{size}": (
            static_key_former,
            {"mixers": ("sepconv", mixer, "mhsa", "mhsa"), **({"key": "continuous"} if kind else {}), **sizes},
        )
        for mixer, kind in (("ska", ""), ("cska", ""), ("fcska", ""), ("ska", "_continuous"))
        for size, sizes in SIZES.items()
    },
    cfg={
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv",
        "classifier": "head.fc.fc2",
    },
    feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
    host=lambda name: "caformer_" + name.rpartition("_")[2].replace("nano", "s18"),
)
