"""Rules for torchvision's VisionTransformer and SwinTransformer (v1 and v2)."""

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision.models import SwinTransformer, VisionTransformer
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2
from torchvision.models.vision_transformer import interpolate_embeddings

from .._typing import Size2
from ..errors import UnsupportedHostError
from ..layers import TokenMixer
from .host import HostRule, Site, StaticKeyHost, packed_bias, register_host_rule
from .keys import token_mixers
from .windows import BiasedMixer, CosineKey, CosineQuery, bias_mlp, bias_table


class TorchvisionViT(StaticKeyHost):
    """What a converted vision transformer gains: another size of images."""

    image_size: int
    patch_size: int
    seq_length: int
    encoder: Any

    def set_input_size(self, img_size: int) -> None:
        """Rebuild position embedding and keys for square images of another size.

        Their parameters are new objects: create the optimizer afterwards.

        Args:
            img_size: Side of the images, a multiple of the patch size.

        Raises:
            UnsupportedHostError: It is no such multiple.
        """
        if img_size < 1 or img_size % self.patch_size:
            raise UnsupportedHostError(f"img_size={img_size} must be a multiple of the patch size {self.patch_size}")
        name, old = "encoder.pos_embedding", self.encoder.pos_embedding
        state: Any = {name: old.detach()}
        new = interpolate_embeddings(img_size, self.patch_size, state)[name]
        self.encoder.pos_embedding = nn.Parameter(new, requires_grad=old.requires_grad)
        self.image_size, self.seq_length = img_size, new.shape[1]
        side = img_size // self.patch_size
        for mixer in token_mixers(self).values():
            mixer.set_input_size((side, side))


class MultiheadMixer(nn.Module):
    """A mixer that is called as ``nn.MultiheadAttention`` is, on one input."""

    def __init__(self, mixer: TokenMixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False) -> tuple[Tensor, None]:
        """(B, N, dim) to the same, and no attention map; ``key`` and ``value`` are ``query``."""
        return self.mixer(query), None


class ShiftedWindowMixer(BiasedMixer):
    """A mixer of shifted windows of a map of any size, with the host's position bias.

    Args:
        mixer: The mixer of one window.
        rel_pos: The bias, a module of timm's.
        shift_size: By how many rows and columns the map is rolled before it is cut.
    """

    def __init__(self, mixer: TokenMixer, rel_pos: Any, shift_size: Size2) -> None:
        super().__init__(mixer, rel_pos)
        self.shift_size = shift_size

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) to the same."""
        if isinstance(x, fx.Proxy):  # a leaf of a symbolic trace: how a map is cut depends on its size
            tracer = cast(fx.Tracer, x.tracer)
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (x,), {})
        window, size = self.mixer.feat_size, (x.shape[1], x.shape[2])
        rows, columns = (-(-extent // side) for extent, side in zip(size, window, strict=True))
        padded = F.pad(x, (0, 0, 0, columns * window[1] - size[1], 0, rows * window[0] - size[0]))
        shift = [0 if count == 1 else s for count, s in zip((rows, columns), self.shift_size, strict=True)]
        bias = self.rel_pos.get_bias()
        if any(shift):
            padded = padded.roll([-s for s in shift], (1, 2))
            regions = torch.zeros(padded.shape[1:3], device=x.device, dtype=torch.long)
            for axis, s in enumerate(shift):
                if s:
                    ahead = torch.arange(regions.shape[axis], 0, -1, device=x.device)
                    part = (ahead <= window[axis]).long() + (ahead <= s).long()
                    regions = regions * 3 + (part[:, None] if axis == 0 else part)
            label = _cut(regions[None, :, :, None], window).squeeze(2)
            apart = label[:, None, :, None] != label[:, None, None, :]
            bias = (bias + torch.zeros_like(apart, dtype=bias.dtype).masked_fill(apart, -100.0)).repeat(
                x.shape[0], 1, 1, 1
            )
        mixed = self.mixer(_cut(padded, window), attn_mask=bias)
        joined = mixed.reshape(x.shape[0], rows, columns, *window, -1).transpose(2, 3).reshape(padded.shape)
        if any(shift):
            joined = joined.roll(shift, (1, 2))
        return joined[:, : size[0], : size[1]].contiguous()


def _cut(maps: Tensor, window: Size2) -> Tensor:
    """(B, H, W, C) to windows (B * windows, N, C)."""
    batch, height, width, channels = maps.shape
    rows, columns = height // window[0], width // window[1]
    cut = maps.reshape(batch, rows, window[0], columns, window[1], channels).transpose(2, 3)
    return cut.reshape(batch * rows * columns, window[0] * window[1], channels)


def vit_sites(model: VisionTransformer) -> dict[str, Site]:
    """The attention of every encoder block."""
    side = model.image_size // model.patch_size
    sites = {}
    for index, block in model.encoder.layers.named_children():
        name, attn = f"encoder.layers.{index}.self_attention", block.self_attention
        if isinstance(attn, MultiheadMixer):
            sites[name] = Site.of_mixer(attn.mixer, wrap=MultiheadMixer)
        elif type(attn) is nn.MultiheadAttention:
            sites[name] = Site.of(
                attn,
                feat_size=(side, side),
                num_prefix_tokens=1,
                qkv_weight=attn.in_proj_weight,
                qkv_bias=attn.in_proj_bias,
                proj=attn.out_proj,
                attn_drop=attn.dropout,
                wrap=MultiheadMixer,
            )
        else:
            raise UnsupportedHostError(f"{name} is a {type(attn).__name__}; supported: MultiheadAttention")
    return sites


def swin_sites(model: SwinTransformer) -> dict[str, Site]:
    """The window attention of every block.

    The model takes images of any size; multiply-accumulates are counted where the first stage has 8 x 8 windows: at
    224 pixels for windows of 7, at 256 for windows of 8.
    """
    sites = {}
    stages: list[Any] = [stage for stage in model.features if isinstance(stage, nn.Sequential)][1:]
    names = {id(block): name for name, block in model.named_modules()}
    for depth, stage in enumerate(stages):
        windows = max(8 >> depth, 1) ** 2
        for block in stage:
            name, attn = f"{names[id(block)]}.attn", block.attn
            if isinstance(attn, ShiftedWindowMixer):
                wrap = partial(ShiftedWindowMixer, rel_pos=attn.rel_pos, shift_size=attn.shift_size)
                sites[name] = Site.of_mixer(attn.mixer, wrap=wrap, needs_map=True, windows=windows)
                continue
            cosine = type(attn) is ShiftedWindowAttentionV2
            if not cosine and type(attn) is not ShiftedWindowAttention:
                raise UnsupportedHostError(
                    f"{name} is a {type(attn).__name__}; supported: ShiftedWindowAttention and its V2"
                )
            fields: dict[str, Any] = {}
            if cosine:
                query_bias, _, value_bias = attn.qkv.bias.chunk(3)
                fields = {
                    "qkv_bias": packed_bias(query_bias, value_bias),
                    "q_norm": CosineQuery(attn.logit_scale),
                    "k_norm": CosineKey(),
                }
            rel_pos = bias_mlp(attn) if cosine else bias_table(attn)
            sites[name] = Site.of(
                attn,
                feat_size=tuple(attn.window_size),
                windows=windows,
                attn_drop=attn.attention_dropout,
                proj_drop=attn.dropout,
                needs_map=True,
                wrap=partial(ShiftedWindowMixer, rel_pos=rel_pos, shift_size=tuple(attn.shift_size)),
                **fields,
            )
    return sites


register_host_rule(HostRule(host=VisionTransformer, sites=vit_sites, mixin=TorchvisionViT))
register_host_rule(HostRule(host=SwinTransformer, sites=swin_sites))
