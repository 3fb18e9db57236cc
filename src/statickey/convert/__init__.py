"""Swap the attention of an existing timm model, or of your own."""

from . import (
    byobnet,
    cascade,
    convit,
    decomposed,
    hiera,
    maps,
    maxvit,
    metaformers,
    naflex,
    offsets,
    parts_of_maps,
    pyramids,
    refusals,
    relpos,
    rotary,
    stages,
    transformers,
    windows,
)
from .calibration.report import CalibrationReport, HeadFigures
from .calibration.settings import Calibration
from .entry import convert
from .host import (
    HostRule,
    Site,
    StaticKeyHost,
    attention_classes,
    register_host_rule,
)
from .keys import check_shapes, forked_random, set_key, set_key_size, set_off_grid, token_mixers
from .losses import feature_loss, key_parameters, layer_loss, relative_error
from .metaformers import stage_grids
from .slots import MapSlot, MixerSlot, TokenSlot
from .swap import ConversionReport, ConvertedModule
from .twins import as_mixers, host_attention

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
    "as_mixers",
    "attention_classes",
    "byobnet",
    "cascade",
    "check_shapes",
    "convert",
    "convit",
    "decomposed",
    "feature_loss",
    "forked_random",
    "hiera",
    "key_parameters",
    "layer_loss",
    "maps",
    "maxvit",
    "metaformers",
    "naflex",
    "offsets",
    "parts_of_maps",
    "pyramids",
    "refusals",
    "host_attention",
    "register_host_rule",
    "relative_error",
    "relpos",
    "rotary",
    "set_key",
    "set_key_size",
    "set_off_grid",
    "stage_grids",
    "stages",
    "token_mixers",
    "transformers",
    "windows",
]
