"""Swap the attention of an existing timm model, or of your own."""

from . import metaformers, transformers, windows
from .host import (
    HostRule,
    Site,
    StaticKeyHost,
    attention_classes,
    check_shapes,
    register_host_rule,
    token_mixers,
)
from .metaformers import stage_grids
from .slots import MapSlot, MixerSlot, TokenSlot
from .swap import ConversionReport, ConvertedModule, convert

__all__ = [
    "ConversionReport",
    "ConvertedModule",
    "HostRule",
    "MapSlot",
    "MixerSlot",
    "Site",
    "StaticKeyHost",
    "TokenSlot",
    "attention_classes",
    "check_shapes",
    "convert",
    "metaformers",
    "register_host_rule",
    "stage_grids",
    "token_mixers",
    "transformers",
    "windows",
]
