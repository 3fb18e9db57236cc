"""Fair comparisons of token mixers: ``compare`` and the pieces it is made of."""

from .main import compare
from .statistics import PairedDifference, holm, paired_difference, paired_differences, t_interval

__all__ = ["PairedDifference", "compare", "holm", "paired_difference", "paired_differences", "t_interval"]
