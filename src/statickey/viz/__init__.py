"""Pictures: attention maps, static keys, curves and differences."""

from . import page
from .capture import LayerMaps, capture_attention, capture_maps, key_colours
from .detections import class_colours, class_scores, draw_detections
from .explorer import AS_STORED, ShownModel, attention_explorer, fitting
from .figures import (
    attention_overlay,
    confusion_matrix,
    differences,
    distances_by_layer,
    heads_by_layers,
    labelled_image,
    learning_curves,
)
from .heads import head_map
from .looks import Look, look
from .measures import (
    attention_distances,
    attention_rollout,
    average_query_map,
    key_similarity,
    static_key_rows,
)
from .page import save_png
from .segmentation import class_map_overlay
from .speed import accuracy_against_cost, scaling

__all__ = [
    "AS_STORED",
    "LayerMaps",
    "Look",
    "ShownModel",
    "accuracy_against_cost",
    "attention_distances",
    "attention_explorer",
    "attention_overlay",
    "attention_rollout",
    "average_query_map",
    "capture_attention",
    "capture_maps",
    "class_colours",
    "class_map_overlay",
    "class_scores",
    "confusion_matrix",
    "differences",
    "distances_by_layer",
    "draw_detections",
    "fitting",
    "head_map",
    "heads_by_layers",
    "key_colours",
    "key_similarity",
    "labelled_image",
    "learning_curves",
    "look",
    "page",
    "save_png",
    "scaling",
    "static_key_rows",
]
