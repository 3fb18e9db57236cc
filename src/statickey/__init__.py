"""Static-key attention for vision."""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from . import models as models
from .convert import (
    Calibration,
    CalibrationReport,
    ConversionReport,
    HostRule,
    Site,
    convert,
    register_host_rule,
    set_key,
    set_key_size,
    set_off_grid,
)
from .errors import StaticKeyError
from .layers import (
    MIXERS,
    ConvStaticKeyAttention,
    FactorizedConvStaticKeyAttention,
    StaticKeyAttention,
    TokenMixer,
)
from .models import load_converted, save_converted
from .ops import resample_static_key, static_key_attention, static_key_weights, unfold_queries

if TYPE_CHECKING:
    from . import bench as bench
    from . import compare as compare
    from . import data as data
    from . import tasks as tasks
    from . import viz as viz

__version__ = "0.1.0"

__all__ = [
    "MIXERS",
    "Calibration",
    "CalibrationReport",
    "ConvStaticKeyAttention",
    "ConversionReport",
    "FactorizedConvStaticKeyAttention",
    "HostRule",
    "Site",
    "StaticKeyAttention",
    "StaticKeyError",
    "TokenMixer",
    "convert",
    "load_converted",
    "register_host_rule",
    "resample_static_key",
    "save_converted",
    "set_key",
    "set_key_size",
    "set_off_grid",
    "static_key_attention",
    "static_key_weights",
    "unfold_queries",
]

_HEAVY = ("bench", "compare", "data", "export", "tasks", "viz")
"""Packages with further dependencies, imported when they are first asked for."""


def __getattr__(name: str) -> ModuleType:
    if name in _HEAVY:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HEAVY})
