"""A mixer as text: what a saved config must say so that the same one is built again."""

import inspect
from typing import Any

from torch import nn

from ..layers import MIXERS, TokenMixer

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


def _argument(mixer: Any, name: str) -> Any:
    if name == "qkv_bias":
        projections = (getattr(mixer, part, None) for part in ("qkv", "qv", "v"))
        return any(part.bias is not None for part in projections if part is not None)
    if name == "proj_bias":
        proj = getattr(mixer, "proj", None)
        return proj is None or proj.bias is not None
    if name == "learned_temperature":
        return mixer.log_temperature is not None
    value = getattr(mixer, name)
    if isinstance(value, nn.Dropout):
        return value.p
    return list(value) if isinstance(value, tuple) else value
