"""Pictures: attention maps, static keys, curves and differences."""

from .capture import capture_attention, key_colours
from .figures import (
    attention_of_token,
    attention_overlay,
    confusion_matrix,
    differences,
    learning_curves,
    static_keys,
)

__all__ = [
    "attention_of_token",
    "attention_overlay",
    "capture_attention",
    "confusion_matrix",
    "differences",
    "key_colours",
    "learning_curves",
    "static_keys",
]
