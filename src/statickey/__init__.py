"""Static-key attention for vision."""

from . import models as models
from .convert import ConversionReport, HostRule, Site, convert, register_host_rule
from .errors import StaticKeyError
from .layers import (
    MIXERS,
    ConvStaticKeyAttention,
    FactorizedConvStaticKeyAttention,
    StaticKeyAttention,
    TokenMixer,
)
from .ops import resample_static_key, static_key_attention, static_key_weights, unfold_queries

__version__ = "0.1.0"

__all__ = [
    "MIXERS",
    "ConvStaticKeyAttention",
    "ConversionReport",
    "FactorizedConvStaticKeyAttention",
    "HostRule",
    "Site",
    "StaticKeyAttention",
    "StaticKeyError",
    "TokenMixer",
    "convert",
    "register_host_rule",
    "resample_static_key",
    "static_key_attention",
    "static_key_weights",
    "unfold_queries",
]
