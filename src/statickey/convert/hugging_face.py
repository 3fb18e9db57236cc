"""Models of Hugging Face's transformers: one rule for all, and how a converted one is saved and loaded.

There are two ways in. transformers lets a function of one's own stand in for the product of queries and keys
(``AttentionInterface``); but then the key projection is still there and still computed, its weights get no gradient,
which data-parallel training refuses, the function is not told the grid, and nothing of it is saved. So this is a host
rule, as for timm: a stand-in takes the place of each attention module and holds the mixer. What users of transformers
rely on, stays:

- **Classes.** The model keeps the name of its class, and a stand-in is an instance of the class it stands for: the
  library finds what to record for ``output_hidden_states`` and ``output_attentions`` by them. Attention maps are
  computed when they are asked for, whichever ``attn_implementation``.
- **Other sizes.** The grid of the tokens is read off the images where they enter the vision tower, or off the map
  that a detector's encoder flattens, and is passed on within the call, down to each mixer. It is never guessed from a
  number of tokens, nor kept from one call to the next, so neither 4 x 6 and 6 x 4 patches nor what is recomputed in a
  backward pass can be confused.
- **Files.** ``config.statickey`` says which mixer stands where; ``from_pretrained`` of this module reads it, builds,
  and loads safetensors. A converted model has an empty tensor in the place of each key projection's weight, which
  makes the library's own ``from_pretrained`` refuse the files instead of drawing projections at random. Convert the
  model that is saved, or a part of it.

``model.no_weight_decay()`` names the keys, which a ``Trainer`` with ``weight_decay`` does not ask for: give it an
optimizer of your own.

Example:
    From a model of the hub to a saved one, and back::

        from statickey.convert.hugging_face import from_pretrained

        model = AutoModelForImageClassification.from_pretrained("facebook/dinov2-small-imagenet1k-1-layer")
        statickey.convert(model, "ska")
        ...  # train
        model.save_pretrained("static")
        model = from_pretrained("static")
"""

import json
from pathlib import Path
from typing import Any, ClassVar, cast

import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from ..errors import StaticKeyError
from ..layers import TokenMixer
from .host import HostRule, Site, StaticKeyHost, converted_class, register_host_rule
from .hugging_face_modules import StandIn
from .hugging_face_towers import hugging_face_sites, towers
from .keys import token_mixers
from .recipe import describe_mixer
from .swap import convert


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
        """Every mixer's keys, and of windows the position bias and the scale of their cosines."""
        spared = ("position_bias", "logit_scale")
        return super().no_weight_decay() | {
            name for name, _ in self.named_parameters() if any(part in name for part in spared)
        }


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
    found: Any = model_class
    if model_class is None:
        config = kwargs.get("config") or AutoConfig.from_pretrained(path, **hub)
        found = (config.architectures or [None])[0]
        found = getattr(transformers, str(found), found)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise StaticKeyError(
            f"{found!r} is no model class of transformers; pass one as model_class, such as ViTForImageClassification"
        )
    name = found.__name__
    cls: Any = found if issubclass(found, HuggingFaceHost) else converted_class(HuggingFaceHost, cast(Any, found))
    model, info = cls.from_pretrained(path, output_loading_info=True, **{"use_safetensors": True} | kwargs)
    mixers = token_mixers(model)
    if not mixers:
        raise StaticKeyError(
            f"{path} holds no converted model (config.json has no 'statickey'); load it with "
            f"{name}.from_pretrained, then convert it"
        )
    missing = [key for key in info["missing_keys"] if any(key.startswith(f"{name}.") for name in mixers)]
    if missing:
        raise StaticKeyError(
            f"{path} lacks {missing[0]} and {len(missing) - 1} more weights of mixers; save the converted model again"
        )
    for module in model.modules():
        if isinstance(module, StandIn):
            module.fill()
    return model


def finish(model: PreTrainedModel) -> None:
    """Let towers tell their mixers the grid, and the config what was converted."""
    for _, tower, family in towers(model):
        if _stand_ins(tower):
            family.tell(tower)
    _note_in_config(model)


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


register_host_rule(
    HostRule(
        host=PreTrainedModel,
        sites=hugging_face_sites,
        mixin=HuggingFaceHost,
        finish=finish,
        takes=lambda model: any(True for _ in towers(model)),
    )
)
