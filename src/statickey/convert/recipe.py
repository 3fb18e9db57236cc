"""Mixers as text: what a saved config must say so that the same ones are built again."""

import inspect
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..layers import MIXERS, TokenMixer
from .swap import convert
from .wrappers import find_host

_OF_THE_HOST = {"self", "dim", "num_prefix_tokens", "device", "dtype"}


def describe_mixer(mixer: TokenMixer) -> dict[str, Any]:
    """The name of a mixer and the arguments of its constructor, in types that JSON knows.

    Returns:
        ``mixer``, a name in ``MIXERS`` (of a class that is not there: its own), and by name the arguments, but for
        those that follow from the host.
    """
    kind = type(mixer)
    name = next((name for name, made in MIXERS.items() if getattr(made, "func", made) is kind), kind.__name__)
    arguments = inspect.signature(kind.__init__).parameters.keys() - _OF_THE_HOST
    return {"mixer": name} | {argument: _argument(mixer, argument) for argument in sorted(arguments)}


def describe_mixers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What stands at each place of a model that has a mixer; see ``describe_mixer``.

    Raises:
        UnsupportedHostError: ``convert`` does not take the model.
    """
    sites = find_host(model).sites
    return {name: describe_mixer(site.module) for name, site in sites.items() if isinstance(site.module, TokenMixer)}


def convert_as_described(model: nn.Module, mixers: Mapping[str, Mapping[str, Any]]) -> None:
    """Make the mixers that ``describe_mixers`` told of, with fresh weights, on the model's own grids.

    Raises:
        StaticKeyError: The model lacks a place, or one cannot have its mixer.
    """
    own, groups = describe_mixers(model), dict[str, list[str]]()
    for name, described in mixers.items():
        wanted, found = dict(described), own.get(name, {})
        for mixer in (wanted, found):
            mixer.pop("feat_size", None)
        if wanted != found:
            groups.setdefault(json.dumps(wanted), []).append(name)
    for text, names in groups.items():
        args = json.loads(text)
        convert(model, args.pop("mixer"), layers=names, keep_weights=False, mixer_args=args)


def _has_bias(mixer: nn.Module, *names: str) -> bool:
    return any(getattr(getattr(mixer, name, None), "bias", None) is not None for name in names)


def _argument(mixer: Any, name: str) -> Any:
    if name == "qkv_bias":
        return _has_bias(mixer, "qkv", "qv", "v", "pwconv1")
    if name == "proj_bias":
        return _has_bias(mixer, "proj", "pwconv2")
    if name == "learned_temperature":
        return mixer.log_temperature is not None
    value = getattr(mixer, name)
    if isinstance(value, nn.Dropout):
        return value.p
    return list(value) if isinstance(value, tuple) else value
