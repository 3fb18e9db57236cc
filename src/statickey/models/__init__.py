"""Named models in timm's registry, and loading of weights into them."""

from . import lsa_vit, static_key_former, static_key_vit
from .build import SMALL_VIT, build_model, count_macs
from .checkpoint import LoadReport, checkpoint_filter_fn, warm_start
from .figures import ModelFigures, model_figures
from .reference import load_reference_state_dict
from .small_vit import small_vit

__all__ = [
    "SMALL_VIT",
    "LoadReport",
    "ModelFigures",
    "build_model",
    "checkpoint_filter_fn",
    "count_macs",
    "load_reference_state_dict",
    "lsa_vit",
    "model_figures",
    "small_vit",
    "static_key_former",
    "static_key_vit",
    "warm_start",
]
