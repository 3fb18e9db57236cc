"""Static-key attention for vision."""

from . import models as models
from .convert import ConversionReport, convert
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
    "StaticKeyAttention",
    "StaticKeyError",
    "TokenMixer",
    "convert",
    "resample_static_key",
    "static_key_attention",
    "static_key_weights",
    "unfold_queries",
]
