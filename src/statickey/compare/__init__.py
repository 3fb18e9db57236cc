"""Fair comparisons of token mixers: ``compare`` and the pieces it is made of."""

from .main import compare
from .statistics import PairedDifference, bootstrap_interval, paired_difference, t_interval

__all__ = ["PairedDifference", "bootstrap_interval", "compare", "paired_difference", "t_interval"]
