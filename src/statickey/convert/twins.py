"""A network with its attention as this package computes it, which can be read."""

from torch import nn

from ..layers import TokenMixer
from .entry import convert
from .wrappers import find_host


def host_attention(model: nn.Module) -> list[str]:
    """Names of the attention modules that are the host's own.

    Raises:
        UnsupportedHostError: No rule takes the model.
    """
    sites = find_host(model).sites
    return [name for name, site in sites.items() if site.is_attention and not isinstance(site.module, TokenMixer)]


def as_mixers(model: nn.Module) -> nn.Module:
    """The same function with self-attention of this package in place of the host's own; changes the model.

    Raises:
        UnsupportedHostError: No rule takes the model, or it has no attention on a map.
    """
    own = host_attention(model)
    if own:
        convert(model, "mhsa", layers=own)
    return model
