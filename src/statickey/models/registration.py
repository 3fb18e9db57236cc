"""What all named models share: how timm builds one, and what it says about weights."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import nn

from .._checks import check_mapping, check_name
from .._typing import Key, OffGrid, Size2
from ..errors import StaticKeyError
from ..layers import MIXERS, has_static_key
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


def with_key_args(
    mixers: Sequence[str],
    mixer_args: Mapping[str, Any],
    *,
    key: Key | None,
    key_size: Size2 | None,
    off_grid: OffGrid | None,
) -> dict[str, dict[str, Any]]:
    """The constructor arguments of each mixer of a model, with what the model was told of its static keys.

    Args:
        mixers: Names in ``MIXERS``.
        mixer_args: Arguments by name of mixer.
        key: Of the mixers with a static key, as the other two; None where nothing is said.
        key_size: As above.
        off_grid: As above.

    Raises:
        UnknownNameError: No mixer of that name.
        StaticKeyError: They are given and no mixer has a static key, ``mixer_args`` say otherwise, or are no mapping.
    """
    for mixer in mixers:
        check_name("mixer", mixer, MIXERS)
    named = {"key": key, "key_size": key_size, "off_grid": off_grid}
    given = {name: value for name, value in named.items() if value is not None}
    static = {mixer for mixer in mixers if has_static_key(MIXERS[mixer])}
    if given and not static:
        lacking = ", ".join(dict.fromkeys(mixers)) + (" do" if len({*mixers}) > 1 else " does")
        raise StaticKeyError(
            f"{given} is for static keys, which {lacking if mixers else 'self-attention of timm does'} not have; "
            "leave it out, or choose ska, cska or fcska"
        )
    merged = {}
    for mixer in mixers:
        own = check_mapping("mixer_args" if len(mixers) == 1 else f"mixer_args[{mixer!r}]", mixer_args.get(mixer))
        for name, value in given.items() if mixer in static else ():
            if name in own and _plain(own[name]) != _plain(value):
                raise StaticKeyError(
                    f"{name}={value!r}, but mixer_args of {mixer} has {name}={own[name]!r}; leave {name} out of "
                    f"mixer_args and give the one you mean as {name}= (mixer_args={{}} drops those of a saved model)"
                )
            own.setdefault(name, value)
        merged[mixer] = own
    return merged


def _plain(value: Any) -> Any:
    """A pair as a tuple, which JSON and YAML make a list."""
    return tuple(value) if isinstance(value, list) else value


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
