"""Rules for hosts whose position bias a query makes, row by row and column by column: SAM's ViT."""

from copy import deepcopy
from typing import Any

from timm.models.vision_transformer_sam import Attention as SamAttention
from timm.models.vision_transformer_sam import VisionTransformerSAM, get_decomposed_rel_pos_bias
from torch import Tensor, nn

from .._typing import Size2
from ..errors import UnsupportedHostError
from .host import Site
from .places import Place, register_placed_rule


class DecomposedBias(nn.Module):
    """A query's product with a learned vector per distance in rows, and one per distance in columns.

    Args:
        rows: One vector per distance, (2*H - 1, d).
        cols: The same of columns, (2*W - 1, d).
        feat_size: The grid (H, W).
    """

    def __init__(self, rows: Tensor, cols: Tensor, feat_size: Size2) -> None:
        super().__init__()
        self.rel_pos_h = nn.Parameter(rows.detach().clone(), requires_grad=rows.requires_grad)
        self.rel_pos_w = nn.Parameter(cols.detach().clone(), requires_grad=cols.requires_grad)
        self.feat_size = feat_size

    def forward(self, query: Tensor) -> Tensor:
        """(B, h, N, d) to (B, h, N, N)."""
        size = self.feat_size
        rows, cols = self.rel_pos_h.to(query.dtype), self.rel_pos_w.to(query.dtype)
        bias: Tensor = get_decomposed_rel_pos_bias(query.flatten(0, 1), rows, cols, size, size)
        return bias.reshape(*query.shape[:2], *bias.shape[1:])


def _read_sam(attn: Any, place: Place) -> Site:
    if attn.rope is not None:
        raise UnsupportedHostError("this SAM has a rotary position embedding; supported: use_rel_pos, or none")
    parts: dict[str, Any] = {"q_norm": deepcopy(attn.q_norm), "k_norm": deepcopy(attn.k_norm)}
    if attn.use_rel_pos:
        parts["query_bias"] = DecomposedBias(attn.rel_pos_h, attn.rel_pos_w, place.feat_size)
    return Site.of(attn, input_fmt="NHWC", **parts, **place.tokens)


def sam_places(model: VisionTransformerSAM) -> dict[str, Place]:
    """The blocks, in windows or on the whole grid."""
    height, width = model.patch_embed.grid_size
    places = {}
    for index, block in enumerate(model.blocks):
        size, grid, windows = block.window_size, (height, width), 1
        if size > 0:
            grid, windows = (size, size), -(-height // size) * -(-width // size)
        places[f"blocks.{index}.attn"] = Place(module=block.attn, feat_size=grid, windows=windows)
    return places


register_placed_rule(VisionTransformerSAM, sam_places, {SamAttention: _read_sam})
