"""The formula and the grid operations, on plain tensors. Knows torch only."""

from .attention import static_key_attention, static_key_weights
from .cells import cell_sizes, pool_cells, pooling_macs, repeat_cells
from .grid import resample_static_key, unfold_queries, window_key_rows, window_merge, window_partition
from .rotary import rotate

__all__ = [
    "cell_sizes",
    "pool_cells",
    "pooling_macs",
    "repeat_cells",
    "resample_static_key",
    "rotate",
    "static_key_attention",
    "static_key_weights",
    "unfold_queries",
    "window_key_rows",
    "window_merge",
    "window_partition",
]
