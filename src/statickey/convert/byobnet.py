"""The rule for networks of timm's "byob" kind whose blocks attend: BoTNet, MobileViT."""

from copy import deepcopy
from typing import Any

from timm.layers import Attention
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.models.byobnet import ByobNet
from timm.models.mobilevit import MobileVitBlock
from torch import Tensor, nn

from ..errors import UnsupportedHostError
from ..layers import TokenMixer
from .host import Site, refusal_reasons
from .places import Place, PlacedMixer, biased, map_grid, register_placed_rule


class BottleneckBias(nn.Module):
    """BoTNet's position bias of a query.

    Args:
        pos_embed: From queries (B*h, N, d) to logits (B*h, N, N).
        factor: On those logits.
    """

    def __init__(self, pos_embed: nn.Module, factor: float) -> None:
        super().__init__()
        self.pos_embed = deepcopy(pos_embed)
        self.factor = factor

    def forward(self, query: Tensor) -> Tensor:
        """(B, h, N, d) to (B, h, N, N)."""
        bias: Tensor = self.pos_embed(query.flatten(0, 1)) * self.factor
        return bias.reshape(*query.shape[:2], *bias.shape[1:])


class PooledMixer(PlacedMixer):
    """A mixer of a map, whose host may halve what comes out."""

    def __init__(self, mixer: TokenMixer, rel_pos: None, pool: nn.Module) -> None:
        super().__init__(mixer, rel_pos)
        self.pool = pool

    def parts(self) -> dict[str, Any]:
        """The pooling."""
        return {"rel_pos": None, "pool": self.pool}

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, H, W) to (B, out_dim, H, W), or half of both."""
        return self.pool(self.mixer(x))  # type: ignore[no-any-return]


def _read_bottleneck(attn: Any, place: Place) -> Site:
    return Site.of(
        attn,
        input_fmt="NCHW",
        value_dim=attn.dim_head_v,
        with_proj=False,
        query_bias=BottleneckBias(attn.pos_embed, attn.scale if attn.scale_pos_embed else 1.0),
        **biased(PooledMixer, None, pool=attn.pool),
        **place.tokens,
    )


def _read_mobilevit(attn: Any, place: Place) -> Site:
    return Site.of(attn, q_norm=attn.q_norm, k_norm=attn.k_norm, out_norm=attn.norm, **place.tokens)


def byobnet_places(model: ByobNet) -> dict[str, Place]:
    """The blocks with bottleneck attention, and MobileViT's, each of whose patches is a grid per pixel of a patch."""
    places = {}
    for info in model.feature_info:
        index = info["stage"] - 1
        if index < 0:
            continue
        height, width = map_grid(model, info["reduction"])
        for name, module in model.stages[index].named_modules(prefix=f"stages.{index}"):
            if isinstance(module, BottleneckAttn):
                grid = (module.pos_embed.height, module.pos_embed.width)
                places[name] = Place(module=module, feat_size=grid)
            elif isinstance(module, PooledMixer):
                places[name] = Place(module=module, feat_size=module.mixer.feat_size)
            elif isinstance(module, MobileVitBlock):
                rows, cols = module.patch_size
                grid = (-(-height // rows), -(-width // cols))
                for number, block in enumerate(module.transformer):
                    places[f"{name}.transformer.{number}.attn"] = Place(
                        module=block.attn, feat_size=grid, windows=module.patch_area
                    )
    if not places:
        reasons = refusal_reasons(model)
        raise UnsupportedHostError(
            f"this {type(model).__name__} has no attention this can convert: "
            + (reasons or "neither BottleneckAttn nor MobileVitBlock")
        )
    return places


register_placed_rule(ByobNet, byobnet_places, {BottleneckAttn: _read_bottleneck, Attention: _read_mobilevit})
