"""Named models in timm's registry, and loading of weights into them."""

from . import lsa_vit, static_key_former, static_key_vit
from .build import OUR_MODULES, SMALL_VIT, build_model, count_macs, timm_args
from .checkpoint import LoadReport, checkpoint_filter_fn, warm_start
from .figures import ModelFigures, model_figures
from .reference import load_reference_state_dict
from .small_vit import small_vit, small_vit_sizes
from .weights import load_exactly, read_weights, start_from

__all__ = [
    "OUR_MODULES",
    "SMALL_VIT",
    "LoadReport",
    "ModelFigures",
    "build_model",
    "checkpoint_filter_fn",
    "count_macs",
    "load_reference_state_dict",
    "load_exactly",
    "lsa_vit",
    "model_figures",
    "read_weights",
    "small_vit",
    "small_vit_sizes",
    "start_from",
    "static_key_former",
    "static_key_vit",
    "timm_args",
    "warm_start",
]
