"""What all named models share: how timm builds one, and what it says about weights."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import nn

from .._checks import check_name
from .._typing import Key, Size2
from ..errors import StaticKeyError
from ..layers import MIXERS, StaticKeyAttention
from .checkpoint import checkpoint_filter_fn

Builder = Callable[..., nn.Module]
CIFAR_VIT_CFG: dict[str, Any] = {
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "fixed_input_size": True,
    "pool_size": None,
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2023, 0.1994, 0.2010),
    "first_conv": "patch_embed.proj",
    "classifier": "head",
}
"""The pretrained configuration, without weights, of a vision transformer for CIFAR-10."""
VIT_FEATURES = {"out_indices": 3, "feature_cls": "getter"}
"""How ``features_only=True`` reads the features of a vision transformer."""


def register(
    module_name: str,
    names: dict[str, tuple[Builder, dict[str, Any]]],
    *,
    cfg: dict[str, Any],
    feature_cfg: dict[str, Any],
    host: Callable[[str], str] | None = None,
) -> list[str]:
    """Make timm entry points, as attributes of the calling module.

    Args:
        module_name: ``__name__`` of the calling module.
        names: For each model its builder and the arguments that make it that model; a user's replace them.
        cfg: The pretrained configuration, without weights.
        feature_cfg: How ``features_only=True`` reads features.
        host: A name to the name of a timm model whose published weights may start it; None where there is none.

    Returns:
        The names.
    """
    module = sys.modules[module_name]
    module.default_cfgs = generate_default_cfgs(dict.fromkeys(names, cfg))  # type: ignore[attr-defined]
    for name, (builder, defaults) in names.items():
        entry = _entry_point(name, builder, defaults, feature_cfg, None if host is None else host(name))
        entry.__module__ = module_name
        setattr(module, name, register_model(entry))
    return list(names)


def key_args(mixers: Sequence[str], key: Key | None, key_size: Size2 | None) -> dict[str, dict[str, Any]]:
    """What a model's ``key`` and ``key_size`` mean for each of its mixers: nothing for one without a static key.

    Raises:
        UnknownNameError: No mixer of that name.
        StaticKeyError: They are given, and no mixer has a static key.
    """
    for mixer in mixers:
        check_name("mixer", mixer, MIXERS)
    given = {name: value for name, value in (("key", key), ("key_size", key_size)) if value is not None}
    made = {mixer: MIXERS[mixer] for mixer in mixers}
    static = {mixer for mixer, cls in made.items() if isinstance(cls, type) and issubclass(cls, StaticKeyAttention)}
    if given and not static:
        raise StaticKeyError(
            f"{given} is for static keys, which {', '.join(mixers) or 'no mixer'} has not; leave it out, or choose "
            "ska, cska or fcska"
        )
    return {mixer: given if mixer in static else {} for mixer in mixers}


def _entry_point(
    name: str, builder: Builder, defaults: dict[str, Any], feature_cfg: dict[str, Any], host: str | None
) -> Callable[..., nn.Module]:
    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        source = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        if pretrained and not (source.has_weights or source.state_dict):
            start = (
                ", or start from a timm model: statickey.models.warm_start(model, "
                f"timm.create_model({host!r}, pretrained=True).state_dict())"
            )
            raise StaticKeyError(
                f"pretrained=True, but no weights are published for {name}: pass pretrained=False (in smp "
                "encoder_weights=None), or checkpoint_path= with weights of your own" + (start if host else "")
            )
        features = dict(feature_cfg)
        if "out_indices" in kwargs and not kwargs.get("features_only"):
            kwargs.pop("out_indices")
        return build_model_with_cfg(  # type: ignore[no-any-return]
            builder,
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=features,
            **defaults | kwargs,
        )

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"The model ``{name}``; any constructor argument of its host may be overridden."
    return entry
