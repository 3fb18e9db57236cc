"""Pictures: attention maps, static keys, curves and differences."""

from . import page
from .capture import LayerMaps, capture_attention, capture_maps, key_colours
from .detections import class_colours, class_scores, draw_detections
from .explorer import ShownModel, as_stored, attention_explorer
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
from .looks import Look, look, on_a_page
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
    "LayerMaps",
    "Look",
    "ShownModel",
    "accuracy_against_cost",
    "as_stored",
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
    "head_map",
    "heads_by_layers",
    "key_colours",
    "key_similarity",
    "labelled_image",
    "learning_curves",
    "look",
    "on_a_page",
    "page",
    "save_png",
    "scaling",
    "static_key_rows",
]
