"""Named models in timm's registry, and loading of weights into them."""

from . import lsa_vit, small_vit, static_key_former, static_key_vit
from .build import PRETRAINED_ARGS, build_model, count_macs, is_ours, timm_args
from .checkpoint import LoadReport, checkpoint_filter_fn, warm_start
from .converted import load_converted, save_converted
from .detectors import ARCHS, Detector, build_detector
from .figures import ModelFigures, model_figures
from .pyramid import Pyramid, build_pyramid
from .query_detector import QueryDetector, check_transformers
from .reference import load_reference_state_dict
from .region_heads import MaskWindows
from .segmenters import DECODERS, Segmenter, build_segmenter
from .swaps import Swap
from .weights import CONFIG_FILE, WEIGHTS_FILE, load_exactly, read_weights, start_from

__all__ = [
    "ARCHS",
    "CONFIG_FILE",
    "DECODERS",
    "PRETRAINED_ARGS",
    "WEIGHTS_FILE",
    "Detector",
    "LoadReport",
    "MaskWindows",
    "ModelFigures",
    "Pyramid",
    "QueryDetector",
    "Segmenter",
    "Swap",
    "build_detector",
    "build_model",
    "build_pyramid",
    "build_segmenter",
    "check_transformers",
    "checkpoint_filter_fn",
    "count_macs",
    "is_ours",
    "load_reference_state_dict",
    "load_converted",
    "load_exactly",
    "lsa_vit",
    "model_figures",
    "read_weights",
    "save_converted",
    "small_vit",
    "start_from",
    "static_key_former",
    "static_key_vit",
    "timm_args",
    "warm_start",
]
