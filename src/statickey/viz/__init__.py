"""Pictures: attention maps, static keys, curves and differences."""

from . import page
from .capture import capture_attention, key_colours
from .figures import (
    attention_of_token,
    attention_overlay,
    confusion_matrix,
    differences,
    learning_curves,
    static_keys,
)
from .page import save_png
from .speed import accuracy_against_cost, scaling

__all__ = [
    "accuracy_against_cost",
    "attention_of_token",
    "attention_overlay",
    "capture_attention",
    "confusion_matrix",
    "differences",
    "key_colours",
    "learning_curves",
    "page",
    "save_png",
    "scaling",
    "static_keys",
]
