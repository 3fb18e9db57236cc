"""Rules for transformers whose host passes a rotary position embedding to its attention, and EVA without one."""

from dataclasses import replace
from typing import Any

import torch
from timm.layers import AttentionRope
from timm.models._input import update_model_input_size
from timm.models.deepseek_vit import DeepseekVitEncoder
from timm.models.eva import Eva, EvaAttention
from timm.models.qwen3_vit import Qwen3VitEncoder
from torch import Tensor, nn

from .._typing import Size2
from ..errors import UnsupportedHostError
from ..layers import TokenMixer
from .host import HostRule, Site, packed_bias, register_host_rule
from .keys import token_mixers
from .transformers import GridHost, patch_grid, refuse_patch_drop, share_grids


class RotaryMixer(nn.Module):
    """A mixer called as timm's blocks call attention that may be given a rotary position embedding."""

    def __init__(self, mixer: TokenMixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """(B, N, dim) to the same."""
        return self.mixer(x, attn_mask=attn_mask, is_causal=is_causal, rope=rope)


class AnySizeHost(GridHost):
    """An encoder that takes any input size at each call, and that timm gives no ``set_input_size``."""

    dynamic_img_size = True

    def set_input_size(self, img_size: Size2 | None = None, patch_size: Size2 | None = None) -> None:
        """Rebuild patch embedding and keys for another input.

        Args:
            img_size: (height, width) in pixels; None keeps it.
            patch_size: (height, width) in pixels; None keeps it.
        """
        self.patch_embed.set_input_size(img_size=img_size, patch_size=patch_size)
        for mixer in token_mixers(self).values():
            mixer.set_input_size(patch_grid(self))
        update_model_input_size(self, self.patch_embed.img_size, patch_size=patch_size)


def rotary_sites(model: Any) -> dict[str, Site]:
    """Every block of a model whose blocks hold timm's EvaAttention or AttentionRope."""
    refuse_patch_drop(model)
    grid, prefix = patch_grid(model), model.num_prefix_tokens
    sites = {}
    for index, block in enumerate(model.blocks):
        name, attn = f"blocks.{index}.attn", block.attn
        if isinstance(attn, RotaryMixer):
            sites[name] = swapped_site(attn, rotary=model.rope is not None)
        elif type(attn) in (EvaAttention, AttentionRope):
            sites[name] = rotary_site(attn, grid, prefix, rotary=model.rope is not None)
        else:
            raise UnsupportedHostError(
                f"{name} is a {type(attn).__name__}; supported: timm's EvaAttention and AttentionRope"
            )
    return sites


def swapped_site(attn: RotaryMixer, *, rotary: bool) -> Site:
    """The site of a mixer that stands there already, in a host with or without a rotary position embedding."""
    rotate_half = getattr(attn.mixer, "rotate_half", False) if rotary else None
    return Site.of_mixer(attn.mixer, wrap=RotaryMixer, rotate_half=rotate_half)


def rotary_site(attn: Any, grid: Size2, num_prefix_tokens: int, *, rotary: bool) -> Site:
    """The site of timm's EvaAttention or AttentionRope."""
    weight, bias = _packed_projections(attn)
    site = Site.of(
        attn,
        feat_size=grid,
        num_prefix_tokens=num_prefix_tokens,
        qkv_weight=weight,
        qkv_bias=bias,
        q_norm=attn.q_norm,
        k_norm=attn.k_norm,
        out_norm=attn.norm,
        gate=attn.gate,
        rotate_half=attn.rotate_half if rotary else None,
        wrap=RotaryMixer,
    )
    shared = 0 if attn.qkv is not None else 2 * (attn.q_proj.weight.numel() - attn.k_proj.weight.numel())
    return replace(site, macs=site.macs - shared * (num_prefix_tokens + grid[0] * grid[1]))


def _packed_projections(attn: Any) -> tuple[Tensor, Tensor | None]:
    """Weight (3*h*d, dim) and bias (3*h*d,) of an attention, whichever way it stores them.

    Where heads share keys and values in groups, each head gets a copy of its own.
    """
    if attn.qkv is not None:
        bias = attn.qkv.bias
        return attn.qkv.weight, packed_bias(
            getattr(attn, "q_bias", None), getattr(attn, "v_bias", None)
        ) if bias is None else bias
    query, key, value = attn.q_proj, attn.k_proj, attn.v_proj
    group = query.weight.shape[0] // key.weight.shape[0]

    def of_each_head(rows: Tensor) -> Tensor:
        heads = rows.reshape(attn.num_heads // group, attn.head_dim, *rows.shape[1:])
        return torch.repeat_interleave(heads, group, dim=0).flatten(0, 1)

    weight = torch.cat([query.weight, of_each_head(key.weight), of_each_head(value.weight)])
    if query.bias is None:
        return weight, None
    if key.bias is None:
        return weight, packed_bias(query.bias, of_each_head(value.bias))
    return weight, torch.cat([query.bias, of_each_head(key.bias), of_each_head(value.bias)])


register_host_rule(HostRule(host=Eva, sites=rotary_sites, mixin=GridHost, finish=share_grids))
for _encoder in (DeepseekVitEncoder, Qwen3VitEncoder):
    register_host_rule(HostRule(host=_encoder, sites=rotary_sites, mixin=AnySizeHost, finish=share_grids))
