"""Swap the attention of an existing timm model, or of your own."""

from . import metaformers, naflex, rotary, transformers, windows
from .calibration.report import CalibrationReport, HeadFigures
from .calibration.settings import Calibration
from .entry import convert
from .host import (
    HostRule,
    Site,
    StaticKeyHost,
    attention_classes,
    check_shapes,
    register_host_rule,
)
from .keys import forked_random, set_key, set_key_size, set_off_grid, token_mixers
from .metaformers import stage_grids
from .slots import MapSlot, MixerSlot, TokenSlot
from .swap import ConversionReport, ConvertedModule

__all__ = [
    "Calibration",
    "CalibrationReport",
    "ConversionReport",
    "ConvertedModule",
    "HeadFigures",
    "HostRule",
    "MapSlot",
    "MixerSlot",
    "Site",
    "StaticKeyHost",
    "TokenSlot",
    "attention_classes",
    "check_shapes",
    "convert",
    "forked_random",
    "metaformers",
    "naflex",
    "register_host_rule",
    "rotary",
    "set_key",
    "set_key_size",
    "set_off_grid",
    "stage_grids",
    "token_mixers",
    "transformers",
    "windows",
]
