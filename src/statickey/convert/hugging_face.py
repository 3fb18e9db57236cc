"""Models of Hugging Face's transformers: one rule for all, and how a converted one is saved and loaded.

There are two ways in. transformers lets a function of one's own stand in for the product of queries and keys
(``AttentionInterface``); but then the key projection is still there and still computed, its weights get no gradient,
which data-parallel training refuses, the function is not told the grid, and nothing of it is saved. So this is a host
rule, as for timm: a stand-in takes the place of each attention module and holds the mixer. What users of transformers
rely on, stays:

- **Classes.** The model keeps the name of its class, and a stand-in is an instance of the class it stands for: the
  library finds what to record for ``output_hidden_states`` and ``output_attentions`` by them. Attention maps are
  computed when they are asked for, whichever ``attn_implementation``.
- **Other sizes.** The grid of the tokens is read off the images where they enter the vision tower, and is passed as
  an argument, down to each mixer. It is never guessed from a number of tokens, nor kept from one call to the next, so
  neither 4 x 6 and 6 x 4 patches nor what is recomputed in a backward pass can be confused.
- **Files.** ``config.statickey`` says which mixer stands where; ``from_pretrained`` of this module reads it, builds,
  and loads safetensors. A converted model has an empty tensor in the place of each key projection's weight, which
  makes the library's own ``from_pretrained`` refuse the files instead of drawing projections at random.

Example:
    From a model of the hub to a saved one, and back::

        model = AutoModelForImageClassification.from_pretrained("facebook/dinov2-small")
        statickey.convert(model, "ska")
        ...  # train
        model.save_pretrained("static")

        from statickey.convert.hugging_face import from_pretrained
        model = from_pretrained("static")
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from .._typing import Size2
from ..errors import StaticKeyError, UnsupportedHostError
from ..layers import TokenMixer
from .host import HostRule, Site, StaticKeyHost, attention_classes, converted_class, register_host_rule
from .hugging_face_modules import (
    RotaryStandIn,
    StandIn,
    SwinStandIn,
    VariableGridStandIn,
    pair,
    pass_grid,
    pass_grids,
)
from .keys import token_mixers
from .recipe import describe_mixer
from .swap import convert


@dataclass(frozen=True, kw_only=True)
class Family:
    """Vision towers of one kind.

    Args:
        towers: Names of the classes that take images.
        num_prefix_tokens: Tokens before the grid, by the tower's config.
        stand_in: What takes the place of an attention module.
        pass_grid: Hook before the tower's forward that adds the grid to its arguments, where mixers need it.
        needs_map: Whether the host adds a bias to the logits.
        rotate_half: How a rotary position embedding pairs channels, where there is one; see ``Site``.
    """

    towers: tuple[str, ...]
    num_prefix_tokens: Callable[[Any], int] = lambda config: 1
    stand_in: type[StandIn] = StandIn
    pass_grid: Callable[..., Any] | None = pass_grid
    needs_map: bool = False
    rotate_half: bool | None = None


def _no_prefix(config: Any) -> int:
    return 0


def _registers(config: Any) -> int:
    return 1 + int(config.num_register_tokens)


FAMILIES: dict[str, Family] = {
    "ViTAttention": Family(towers=("ViTModel",)),
    "DeiTAttention": Family(towers=("DeiTModel",), num_prefix_tokens=lambda config: 2),
    "Dinov2Attention": Family(towers=("Dinov2Model", "Dinov2Backbone")),
    "Dinov2WithRegistersAttention": Family(
        towers=("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"), num_prefix_tokens=_registers
    ),
    "DINOv3ViTAttention": Family(
        towers=("DINOv3ViTModel", "DINOv3ViTBackbone"),
        num_prefix_tokens=_registers,
        stand_in=RotaryStandIn,
        rotate_half=True,
    ),
    "IJepaAttention": Family(towers=("IJepaModel",), num_prefix_tokens=_no_prefix),
    "SiglipAttention": Family(towers=("SiglipVisionModel",), num_prefix_tokens=_no_prefix),
    "Siglip2Attention": Family(
        towers=("Siglip2VisionModel",),
        num_prefix_tokens=_no_prefix,
        stand_in=VariableGridStandIn,
        pass_grid=pass_grids,
    ),
    "CLIPAttention": Family(towers=("CLIPVisionModel",)),
    "BeitAttention": Family(towers=("BeitModel",), needs_map=True),
    "SwinAttention": Family(
        towers=("SwinModel",), num_prefix_tokens=_no_prefix, stand_in=SwinStandIn, pass_grid=None, needs_map=True
    ),
}
"""By the name of the attention class, so that no model is imported before it is met."""


class HuggingFaceHost(StaticKeyHost):
    """What a converted model of transformers gains: its config tells how it was converted, and rebuilds it so."""

    class_prefix: ClassVar[str] = ""
    config: Any

    def __init__(self, config: Any, *inputs: Any, **kwargs: Any) -> None:
        super().__init__(config, *inputs, **kwargs)
        _convert_by_config(self)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save the model, and in its config what stands where; see transformers' ``save_pretrained``."""
        _note_in_config(self)
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def no_weight_decay(self) -> set[str]:
        """Every mixer's keys, and the position bias of windows."""
        bias = {name for name, _ in self.named_parameters() if "relative_position_bias" in name}
        return super().no_weight_decay() | bias


def from_pretrained(path: str | Path, model_class: type[PreTrainedModel] | None = None, **kwargs: Any) -> Any:
    """Load a converted model that ``save_pretrained`` or ``push_to_hub`` wrote. No remote code, no pickle.

    Args:
        path: Folder, or name on the hub.
        model_class: The class to build, such as ``ViTForImageClassification``; default the one that was saved.
        kwargs: As in transformers' ``from_pretrained``: ``dtype``, ``device_map``, ``revision``, ...

    Returns:
        The model, in eval mode.

    Raises:
        StaticKeyError: The files hold no converted model, or lack a weight of a mixer; or there is no such class.
    """
    hub = {
        name: kwargs[name]
        for name in ("revision", "token", "cache_dir", "local_files_only", "subfolder")
        if name in kwargs
    }
    if model_class is None:
        config = kwargs.get("config") or AutoConfig.from_pretrained(path, **hub)
        named = (config.architectures or [""])[0]
        model_class = getattr(transformers, named, None)
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise StaticKeyError(
            f"model_class is {model_class!r}; pass a model class of transformers, such as ViTForImageClassification"
        )
    cls: Any = model_class
    if not issubclass(model_class, HuggingFaceHost):
        cls = converted_class(HuggingFaceHost, model_class)
    model, info = cls.from_pretrained(path, output_loading_info=True, **{"use_safetensors": True} | kwargs)
    mixers = token_mixers(model)
    if not mixers:
        raise StaticKeyError(
            f"{path} holds no converted model (config.json has no 'statickey'); load it with "
            f"{model_class.__name__}.from_pretrained, then convert it"
        )
    missing = [key for key in info["missing_keys"] if any(key.startswith(f"{name}.") for name in mixers)]
    if missing:
        raise StaticKeyError(
            f"{path} lacks {missing[0]} and {len(missing) - 1} more weights of mixers; save the converted model again"
        )
    return model


def hugging_face_sites(model: PreTrainedModel) -> dict[str, Site]:
    """The self-attention of every vision tower in a model."""
    sites: dict[str, Site] = {}
    for tower_name, tower, family in _towers(model):
        for name, module in tower.named_modules(prefix=tower_name):
            if FAMILIES.get(_kind(module)) is family and name not in sites:
                sites[name] = _site(module, tower, family)
    if sites:
        return sites
    towers = ", ".join(sorted(tower for family in FAMILIES.values() for tower in family.towers))
    found = attention_classes(model)
    raise UnsupportedHostError(
        f"{type(model).__name__} has no vision tower this can convert (attention classes in it: "
        f"{', '.join(found) if found else 'none'}); supported: whatever contains one of {towers}"
    )


def finish(model: PreTrainedModel) -> None:
    """Let towers tell their mixers the grid, and the config what was converted."""
    for _, tower, family in _towers(model):
        hook = family.pass_grid
        if hook is not None and hook not in tower._forward_pre_hooks.values():
            tower.register_forward_pre_hook(hook, with_kwargs=True)
    _note_in_config(model)


def _site(module: Any, tower: Any, family: Family) -> Site:
    window = getattr(module, "relative_position_bias", None)
    feat_size, windows = _grid(tower), 1
    if window is not None:
        feat_size = window.window_size
        block = next(layer for layer in tower.modules() if getattr(layer, "attention", None) is module)
        windows = _num_windows(block.input_resolution, feat_size)
    fields: dict[str, Any] = {
        "windows": windows,
        "needs_map": family.needs_map,
        "rotate_half": family.rotate_half,
        "wrap": partial(_stand_in, family.stand_in, module),
    }
    if isinstance(module, StandIn):
        return Site.of_mixer(module.mixer, **fields)
    projections = [module.q_proj, module.k_proj, module.v_proj]
    num_heads = _first(module, "num_attention_heads", "num_heads")
    scale = _first(module, "scaling", "scale")
    return Site.of(
        module,
        feat_size=feat_size,
        num_prefix_tokens=family.num_prefix_tokens(tower.config),
        num_heads=num_heads,
        qkv_weight=torch.cat([projection.weight for projection in projections]),
        qkv_bias=_packed_bias(projections),
        proj=_first(module, "o_proj", "out_proj"),
        attn_drop=_first(module, "attention_dropout", "dropout"),
        mixer_args={} if scale == module.head_dim**-0.5 else {"scale": scale},
        init_weights=tower._init_weights,
        **fields,
    )


def _stand_in(kind: type[StandIn], module: nn.Module, mixer: TokenMixer) -> nn.Module:
    host = type(module).__bases__[1] if isinstance(module, StandIn) else type(module)
    return cast(Any, converted_class(kind, host))(mixer, module)  # type: ignore[no-any-return]


def _towers(model: nn.Module) -> Iterator[tuple[str, Any, Family]]:
    by_class = {tower: family for family in FAMILIES.values() for tower in family.towers}
    for name, module in model.named_modules():
        family = by_class.get(_kind(module))
        if family is not None:
            yield name, module, family


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


def _num_windows(resolution: Size2, window_size: Size2) -> int:
    rows, columns = (-(-extent // side) for extent, side in zip(resolution, window_size, strict=True))
    return rows * columns


def _note_in_config(model: PreTrainedModel) -> None:
    model.config.statickey = {name: describe_mixer(mixer) for name, mixer in _stand_ins(model).items()}


def _stand_ins(model: nn.Module) -> dict[str, TokenMixer]:
    """Mixers by the name of the module they stand in for."""
    return {name: module.mixer for name, module in model.named_modules() if isinstance(module, StandIn)}


def _convert_by_config(model: nn.Module) -> None:
    """Convert a fresh model as the configs in it tell; those of a whole before those of its parts."""
    seen: set[int] = set()
    for module in list(model.modules()):
        if not isinstance(module, PreTrainedModel) or id(module.config) in seen:
            continue
        seen.add(id(module.config))
        groups: dict[str, list[str]] = {}
        for name, description in (getattr(module.config, "statickey", None) or {}).items():
            groups.setdefault(json.dumps(description), []).append(name)
        for description, names in groups.items():
            _convert_as_described(module, names, json.loads(description))


def _convert_as_described(model: PreTrainedModel, names: list[str], description: dict[str, Any]) -> None:
    sites = hugging_face_sites(model)
    layers = [_find(name, sites, model) for name in names]
    layers = [name for name in layers if not isinstance(model.get_submodule(name), StandIn)]
    if not layers:
        return
    feat_size = description.pop("feat_size")
    convert(model, description.pop("mixer"), layers=layers, keep_weights=False, mixer_args=description)
    for name in layers:
        cast(StandIn, model.get_submodule(name)).mixer.set_input_size(tuple(feat_size))


def _find(name: str, sites: dict[str, Site], model: nn.Module) -> str:
    """The place that had a name in the model that was saved, of which this may be a part, or which it may contain."""
    for site in sites:
        if f".{site}".endswith(f".{name}") or f".{name}".endswith(f".{site}"):
            return site
    raise StaticKeyError(
        f"config.statickey names {name}, which {type(model).__name__} does not have; build the class that was saved"
    )


register_host_rule(HostRule(host=PreTrainedModel, sites=hugging_face_sites, mixin=HuggingFaceHost, finish=finish))
