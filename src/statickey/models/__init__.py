"""Named hosts with swapped attention."""

from .build import SMALL_VIT, build_model, count_macs
from .small_vit import small_vit

__all__ = ["SMALL_VIT", "build_model", "count_macs", "small_vit"]
