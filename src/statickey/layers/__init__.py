"""Token mixers: the static-key layers, the baselines they are compared with, and the registry of both."""

from collections.abc import Callable

from .attention import AttentionMixer
from .baselines import (
    ConstantAttention,
    IdentityMixer,
    PoolMixer,
    RandomAttention,
    SelfAttention,
    SepConvMixer,
    SharedKeyValueAttention,
    SynthesizerAttention,
)
from .continuous import ContinuousKey
from .conv_static_key import ConvStaticKeyAttention, FactorizedConvStaticKeyAttention
from .mixer import GridState, TokenMixer
from .partly_static import LogitBias, PartlyStaticAttention
from .parts import HeadMix, NormedLinear, Reduction, TokenGrids
from .static_key import StaticKeyAttention, has_static_key

MIXERS: dict[str, Callable[..., TokenMixer]] = {
    "mhsa": SelfAttention,
    "ska": StaticKeyAttention,
    "cska": ConvStaticKeyAttention,
    "fcska": FactorizedConvStaticKeyAttention,
    "partly_static": PartlyStaticAttention,
    "identity": IdentityMixer,
    "pool": PoolMixer,
    "sepconv": SepConvMixer,
    "random": RandomAttention,
    "constant": ConstantAttention,
    "synthesizer": SynthesizerAttention,
    "kv_shared": SharedKeyValueAttention,
}
"""Mixers by name. Add a ``TokenMixer`` of your own under a new name to swap in or compare it."""

__all__ = [
    "MIXERS",
    "AttentionMixer",
    "ConstantAttention",
    "ContinuousKey",
    "ConvStaticKeyAttention",
    "FactorizedConvStaticKeyAttention",
    "GridState",
    "HeadMix",
    "IdentityMixer",
    "LogitBias",
    "NormedLinear",
    "PartlyStaticAttention",
    "PoolMixer",
    "RandomAttention",
    "Reduction",
    "SelfAttention",
    "SepConvMixer",
    "SharedKeyValueAttention",
    "StaticKeyAttention",
    "SynthesizerAttention",
    "TokenGrids",
    "TokenMixer",
    "has_static_key",
]
