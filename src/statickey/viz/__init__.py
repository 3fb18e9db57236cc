"""Pictures: attention maps, static keys, curves and differences."""

from . import page
from .capture import capture_attention, key_colours
from .detections import class_colours, class_scores, draw_detections
from .figures import (
    attention_of_token,
    attention_overlay,
    confusion_matrix,
    differences,
    labelled_image,
    learning_curves,
    static_keys,
)
from .heads import head_map
from .page import save_png
from .segmentation import class_map_overlay
from .speed import accuracy_against_cost, scaling

__all__ = [
    "accuracy_against_cost",
    "attention_of_token",
    "attention_overlay",
    "capture_attention",
    "class_colours",
    "class_map_overlay",
    "class_scores",
    "confusion_matrix",
    "differences",
    "draw_detections",
    "head_map",
    "key_colours",
    "labelled_image",
    "learning_curves",
    "page",
    "save_png",
    "scaling",
    "static_keys",
]
