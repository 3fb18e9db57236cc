"""Pictures: attention maps, static keys, curves and differences."""

from .capture import capture_attention, key_colours
from .figures import attention_of_token, differences, learning_curves, static_keys

__all__ = [
    "attention_of_token",
    "capture_attention",
    "differences",
    "key_colours",
    "learning_curves",
    "static_keys",
]
