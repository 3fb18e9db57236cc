"""Rules for hosts that attend on maps or windows of them without a bias: VOLO, FastViT, Visformer, DaViT, NesT."""

from typing import Any

from timm.models.davit import DaVit, SpatialBlock
from timm.models.davit import WindowAttention as DaVitAttention
from timm.models.fastvit import Attention as FastVitAttention
from timm.models.fastvit import AttentionBlock, FastVit
from timm.models.nest import Attention as NestAttention
from timm.models.nest import Nest
from timm.models.visformer import Attention as VisformerAttention
from timm.models.visformer import Visformer
from timm.models.volo import VOLO
from timm.models.volo import Attention as VoloAttention
from timm.models.volo import Transformer as VoloBlock
from torch import Tensor, nn

from .._typing import InputFmt, Size2
from .host import Site
from .places import MapHost, MapMixer, Place, biased, map_grid, register_placed_rule


class BlockMixer(MapMixer):
    """A mixer called as NesT's layers call their attention, with the blocks of an image on an axis of their own."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, blocks, N, dim) to the same."""
        return super().forward(x.flatten(0, 1)).reshape(x.shape)


def _reader(input_fmt: InputFmt) -> Any:
    def read(attn: Any, place: Place) -> Site:
        return Site.of(attn, input_fmt=input_fmt, **place.tokens)

    return read


def _read_nest(attn: Any, place: Place) -> Site:
    heads = attn.num_heads
    proj = nn.Linear(attn.proj.in_features, attn.proj.out_features, device="meta")
    rows = attn.proj.weight.detach()
    columns = rows.reshape(len(rows), -1, heads).transpose(1, 2).flatten(1)  # the host's: heads last
    proj.weight, proj.bias = nn.Parameter(columns), attn.proj.bias
    return Site.of(attn, proj=proj, **biased(BlockMixer, None), **place.tokens)


def volo_places(model: VOLO) -> dict[str, Place]:
    """The transformer blocks; outlookers see a neighbourhood, class attention a single query: they stay."""
    height, width = model.pos_embed.shape[1:3]
    return {
        f"{name}.attn": Place(module=block.attn, feat_size=(height, width))
        for name, block in model.named_modules()
        if isinstance(block, VoloBlock)
    }


def fastvit_places(model: FastVit) -> dict[str, Place]:
    """The stages whose token mixer is attention."""
    places = {}
    for index, stage in enumerate(model.stages):
        grid = map_grid(model, model.feature_info[index]["reduction"])
        for name, block in stage.named_modules(prefix=f"stages.{index}"):
            if isinstance(block, AttentionBlock):
                places[f"{name}.token_mixer"] = Place(module=block.token_mixer, feat_size=grid)
    return places


def visformer_places(model: Visformer) -> dict[str, Place]:
    """The stages that have attention."""
    places = {}
    for info in model.feature_info:
        height, width = (extent // info["reduction"] for extent in model.img_size)
        for index, block in enumerate(getattr(model, info["module"])):
            if block.attn is not None:
                name = f"{info['module']}.{index}.attn"
                places[name] = Place(module=block.attn, feat_size=(height, width))
    return places


def davit_places(model: DaVit) -> dict[str, Place]:
    """The windows of the spatial blocks; channel blocks have no map of tokens on tokens."""
    places = {}
    for index, stage in enumerate(model.stages):
        height, width = map_grid(model, model.feature_info[index]["reduction"])
        for name, block in stage.named_modules(prefix=f"stages.{index}"):
            if isinstance(block, SpatialBlock):
                window: Size2 = block.window_size
                windows = -(-height // window[0]) * -(-width // window[1])
                places[f"{name}.attn"] = Place(module=block.attn, feat_size=window, windows=windows)
    return places


def nest_places(model: Nest) -> dict[str, Place]:
    """The blocks of every level."""
    size = model.block_size
    return {
        f"levels.{index}.transformer_encoder.{number}.attn": Place(
            module=layer.attn, feat_size=(size, size), windows=model.num_blocks[index]
        )
        for index, level in enumerate(model.levels)
        for number, layer in enumerate(level.transformer_encoder)
    }


register_placed_rule(VOLO, volo_places, {VoloAttention: _reader("NHWC")})
register_placed_rule(FastVit, fastvit_places, {FastVitAttention: _reader("NCHW")}, MapHost)
register_placed_rule(Visformer, visformer_places, {VisformerAttention: _reader("NCHW")})
register_placed_rule(DaVit, davit_places, {DaVitAttention: _reader("NLC")}, MapHost)
register_placed_rule(Nest, nest_places, {NestAttention: _read_nest})
